"""The Inspect page: what a model in this process expects of a text, and how it comes to it (model/inspect.py)."""

import altair as alt
import pandas as pd
import streamlit as st

from model.errors import UserError
from scripts.web import sources
from scripts.web.chat import KEEP, choose_sources
from scripts.web.labels import say
from scripts.web.text import plain, show_problem

MOST_TOKENS = 64             # of the text that are shown: a map has this number squared of cells
LIKELIEST = 10
AXIS, TOP = 60, 190         # pixels of height that a chart takes for an axis, and for slanted words and a legend, too
EXAMPLE = "Mia lives in"


def token_names(tokenizer, ids):
    """One label per token, unlike all others: "3 ·the"."""
    return [f"{place} {plain(tokenizer.show(index))}" for place, index in enumerate(ids)]


def page(cfg):
    st.title(say("inspect"))
    try:
        chosen, problem = choose_sources(cfg, compare=False)[0], ""
    except UserError as error:
        chosen, problem = None, str(error)
    if chosen and chosen[0] != "local":
        st.info(say("only_here"))
        return
    if not problem and chosen[1] == "":
        problem = say("no_model")
    if not problem:
        try:
            with st.spinner(say("loading")):
                loaded = sources.load(*chosen[1:], cfg)
            draw(loaded)
        except UserError as error:
            problem = str(error)
    if problem:
        show_problem(problem)


def draw(loaded):
    """The text field, and everything about the text in it."""
    from model import inspect
    tokenizer = loaded.tokenizer
    text = st.text_area(say("text"), EXAMPLE, key="inspected", height=90, **KEEP)
    chat = tokenizer.chat_template is not None and st.toggle(say("as_chat"), key="inspect_chat", **KEEP)
    ids = tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True)[0] if chat else \
        [tokenizer.bos_id, *tokenizer.encode(text)]
    most = min(MOST_TOKENS, loaded.model.config.max_position_embeddings)
    if len(ids) > most:
        st.caption(say("shortened", most=most, count=len(ids)))
        ids = ids[:most]
    # All on the engine's thread, between two steps of it: nobody else may use the model meanwhile.
    config = loaded.model.config
    seen = loaded.engine.call(lambda model: inspect.trace(model, ids), loaded.adapter)
    names = token_names(tokenizer, ids)

    place = st.select_slider(say("after_token"), range(len(ids)), len(ids) - 1, format_func=names.__getitem__,
                             key=f"place_{len(ids)}") if len(ids) > 1 else 0
    draw_next(inspect.next_tokens(seen.logits[place], LIKELIEST), tokenizer)
    draw_certainty(inspect.entropy(seen.logits), inspect.surprise(seen.logits, ids), names)

    st.subheader(say("lens"), help=say("lens_help"))
    draw_lens(loaded.engine.call(lambda model: inspect.logit_lens(model, seen, place), loaded.adapter), tokenizer)

    st.subheader(say("attention"), help=say("attention_help"))
    left, right = st.columns(2)
    layer = left.number_input(say("layer"), 1, config.num_hidden_layers, 1, key="layer", **KEEP) - 1
    head = right.number_input(say("head"), 1, config.num_attention_heads, 1, key="head", **KEEP) - 1
    draw_attention(loaded.engine.call(lambda model: inspect.attention_map(model, seen, layer, head), loaded.adapter),
                   names)

    st.subheader(say("experts"), help=say("experts_help"))
    if not seen.routes:
        st.caption(say("no_experts"))
        return
    layer = st.selectbox(f"{say('layer')} ({say('experts')})", list(seen.routes), format_func=lambda n: str(n + 1))
    draw_experts(*inspect.router_choices(seen, layer)[1:], names)


def draw_next(likeliest, tokenizer):
    """Bars: the likeliest next tokens."""
    st.subheader(say("next_token"), help=say("next_token_help"))
    table = pd.DataFrame({"token": [plain(tokenizer.show(index)) for index, _ in likeliest],
                          "id": [index for index, _ in likeliest], "p": [p for _, p in likeliest]})
    table["name"] = [f"{token}  ({index})" for token, index in zip(table["token"], table["id"], strict=True)]
    bars = alt.Chart(table).encode(
        y=alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=180)),
        x=alt.X("p:Q", title=say("probability"), axis=alt.Axis(format=".0%", tickCount=4)),
        tooltip=[alt.Tooltip("token:N", title=say("token")), "id:Q",
                 alt.Tooltip("p:Q", title=say("probability"), format=".3%")])
    words = bars.mark_text(align="left", dx=4).encode(text=alt.Text("p:Q", format=".1%"), color=alt.value("gray"))
    st.altair_chart((bars.mark_bar(cornerRadiusEnd=3) + words).properties(height=AXIS + 24 * len(likeliest)))


def draw_certainty(entropies, surprises, names):
    """Two lines of bars over the text: how open the next token was, and how unexpected this one."""
    st.subheader(say("per_token"), help=say("per_token_help"))
    table = pd.DataFrame({"token": names * 2, "bits": entropies.tolist() + [None, *surprises.tolist()],
                          "what": [say("entropy")] * len(names) + [say("surprise")] * len(names)})
    st.altair_chart(alt.Chart(table.dropna()).mark_bar().encode(
        x=alt.X("token:N", sort=names, title=None, axis=alt.Axis(labelAngle=-60, labelLimit=90)),
        y=alt.Y("bits:Q", title=say("bits")), xOffset=alt.XOffset("what:N", sort=None),
        color=alt.Color("what:N", sort=None, title=None, legend=alt.Legend(orient="top", labelLimit=300, columns=1)),
        tooltip=[alt.Tooltip("token:N", title=say("token")), alt.Tooltip("what:N", title=" "),
                 alt.Tooltip("bits:Q", title=say("bits"), format=".2f")]))


def draw_lens(logits, tokenizer):
    """A table of words: the likeliest after every layer, coloured by probability. logits (L + 1, V)."""
    values, ids = logits.softmax(-1).topk(min(5, logits.shape[-1]))        # (L + 1, 5)
    table = pd.DataFrame([{"layer": layer, "rank": rank + 1, "token": plain(tokenizer.show(ids[layer, rank])),
                           "p": values[layer, rank].item()}
                          for layer in range(len(logits)) for rank in range(ids.shape[1])])
    cells = alt.Chart(table).encode(
        x=alt.X("rank:O", title=say("rank"), axis=alt.Axis(labelAngle=0)), y=alt.Y("layer:O", title=say("layer")),
        tooltip=[alt.Tooltip("layer:O", title=say("layer")), alt.Tooltip("token:N", title=say("token")),
                 alt.Tooltip("p:Q", title=say("probability"), format=".2%")])
    words = cells.mark_text(limit=100).encode(
        text="token:N", color=alt.condition("datum.p > 0.6", alt.value("white"), alt.value("black")))
    st.altair_chart((cells.mark_rect().encode(
        color=alt.Color("p:Q", title=None, scale=alt.Scale(domain=[0, 1], scheme="oranges"), legend=None))
        + words).properties(height=AXIS + 24 * len(logits)))


def draw_attention(weights, names):
    """A map: who looks at whom. weights (T, S); columns before the text are virtual tokens of an adapter."""
    T, S = weights.shape
    columns = [f"+{number}" for number in range(S - T)] + names
    table = pd.DataFrame([{"row": names[t], "column": columns[s], "share": weights[t, s].item()}
                          for t in range(T) for s in range(S - T + t + 1)])
    st.altair_chart(alt.Chart(table).mark_rect().encode(
        x=alt.X("column:N", sort=columns, title=None, axis=alt.Axis(labelAngle=-60, labelLimit=70, labelOverlap=True)),
        y=alt.Y("row:N", sort=names, title=None, axis=alt.Axis(labelLimit=70, labelOverlap=False)),
        color=alt.Color("share:Q", title=None, scale=alt.Scale(domain=[0, 1], scheme="oranges"),
                        legend=alt.Legend(orient="top", gradientLength=150, format=".0%")),
        tooltip=[alt.Tooltip("row:N", title=say("looks")), alt.Tooltip("column:N", title=say("looked_at")),
                 alt.Tooltip("share:Q", title=say("share"), format=".1%")]).properties(height=TOP + 18 * T))


def draw_experts(experts, probabilities, names):
    """A map: tokens and experts; a dot where an expert was chosen. experts (T, k), probabilities (T, E)."""
    chosen = [set(row) for row in experts.tolist()]
    table = pd.DataFrame([{"token": name, "expert": expert, "p": p, "chosen": expert in chosen[place]}
                          for place, (name, row) in enumerate(zip(names, probabilities.tolist(), strict=True))
                          for expert, p in enumerate(row)])
    cells = alt.Chart(table).encode(
        x=alt.X("expert:O", title=say("expert"), axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("token:N", sort=names, title=None, axis=alt.Axis(labelLimit=70, labelOverlap=False)),
        tooltip=[alt.Tooltip("token:N", title=say("token")), alt.Tooltip("expert:O", title=say("expert")),
                 alt.Tooltip("p:Q", title=say("probability"), format=".1%")])
    st.altair_chart((cells.mark_rect().encode(
        color=alt.Color("p:Q", title=None, scale=alt.Scale(scheme="oranges"),
                        legend=alt.Legend(orient="top", gradientLength=150, format=".0%")))
        + cells.transform_filter("datum.chosen").mark_circle(color="black", size=40)).properties(
            height=TOP + 18 * len(names)))
