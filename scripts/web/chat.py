"""The Chat page.

A conversation is a list of exchanges: the user's message, and the answer of each model that was asked (one, or two
side by side). Buttons only note what is wanted; the page then draws the exchanges, starts the answers that are
missing, and redraws those that are being written until they end.
"""

import json
import time
from dataclasses import asdict, dataclass, field, fields

import streamlit as st

from model.cli import SHIPPED
from model.errors import UserError
from scripts.chat import AUTO_PROMPTS
from scripts.web import sources
from scripts.web.answers import Answer, Settings, draw_seed, remote_models, write_local, write_remote
from scripts.web.labels import say
from scripts.web.text import escaped, plain, show, show_problem

REASONS = ("stop", "length", "cancelled", "tool_calls", "error")      # for which there are words
REDRAW = 0.08                # seconds between two looks at an answer that is being written
OTHER = "other"              # among paths, which are absolute: one to be typed
KEEP = {"persist_state": "session"}       # a knob keeps its value while another page is open
SLIDERS = {"temperature": (0.0, 2.0, 0.05), "top_p": (0.05, 1.0, 0.05), "top_k": (0, 200, 1), "min_p": (0.0, 0.5, 0.01),
           "repetition_penalty": (0.8, 2.0, 0.05), "presence_penalty": (-2.0, 2.0, 0.1),
           "frequency_penalty": (-2.0, 2.0, 0.1)}


@dataclass
class Exchange:
    """A message of the user's, and the answers to it: none as long as nobody was asked."""
    text: str
    answers: list = field(default_factory=list)
    names: list = field(default_factory=list)          # of the models that answered
    attempt: int = 0         # how often it was answered before: with a fixed seed, each attempt has another one


# --- what the sidebar asks


def choose_folder(label, other_label, found, first, key, nothing=""):
    """A folder out of those found, or typed: its path, "" for none (a choice, called so, where `nothing` is given)."""
    paths = list(found)
    if first and first not in paths:
        paths = [first, *paths]
    options = ([""] if nothing or not paths else []) + paths + [OTHER]
    names = {"": nothing or "—", OTHER: say("other_folder")}
    chosen = st.selectbox(label, options, index=options.index(first) if first in options else 0, key=key,
                          format_func=lambda path: names[path] if path in names else sources.shown(path), **KEEP)
    if chosen != OTHER:
        return chosen
    typed = st.text_input(other_label, key=f"{key}_typed", **KEEP).strip()
    return str(sources.place(typed)) if typed else ""


def choose_sources(cfg, compare=True):
    """The sidebar's models: [("local", folder, adapter)] or [("remote", url, key, model)], two where compared."""
    with st.sidebar:
        where = st.selectbox(say("run_where"), ("here", "server"), index=int(bool(cfg.url)), format_func=say,
                             key="where", **KEEP)
        if where == "server":
            return choose_remote(cfg)
        runs = sources.place(cfg.runs)
        checkpoints, adapters = sources.find((str(runs), str(sources.ROOT / "checkpoints"), str(SHIPPED)))
        first = next((str(path) for path in (sources.place(cfg.model), SHIPPED) if path.is_dir()), "")
        adapter = str(sources.place(cfg.adapter)) if cfg.adapter else ""

        def choose(number, first, adapter):
            folder = choose_folder(say(f"model{number}"), say("folder"), checkpoints, first, f"model{number}")
            return "local", folder, choose_folder(say(f"adapter{number}"), say("adapter_folder"), adapters, adapter,
                                                  f"adapter{number}", say("no_adapter"))

        chosen = [choose("", first, adapter)]
        if compare and st.toggle(say("compare"), key="compare", **KEEP):
            chosen.append(choose("_2", first, ""))
        return chosen


def choose_remote(cfg):
    url = st.text_input(say("url"), cfg.url or "http://127.0.0.1:8998/v1", key="url", **KEEP).strip()
    key = st.text_input(say("key"), type="password", key="api_key", **KEEP).strip()
    names = known_models(url, key)
    chosen = [("remote", url, key, st.selectbox(say("model"), names, key="remote_model", **KEEP))]
    if st.toggle(say("compare"), key="compare", **KEEP):
        chosen.append(("remote", url, key, st.selectbox(say("model_2"), names, key="remote_model_2", **KEEP)))
    return chosen


@st.cache_data(ttl=30, show_spinner=False, max_entries=20)
def known_models(url, key):
    return remote_models(url, key)


def choose_settings(remote=False):
    """The sidebar's `Settings`. remote: a server answers, which knows how long an answer can be."""
    default, values = Settings(), {}
    with st.sidebar:
        values["system"] = st.text_area(say("system"), key="system", height=68, **KEEP).strip()
        values["thinking"] = st.segmented_control(say("thinking"), ("auto", "on", "off"), default=default.thinking,
                                                  format_func=say, key="thinking", required=True, **KEEP)
        with st.expander(say("settings")):
            for name, (low, high, step) in SLIDERS.items():
                values[name] = st.slider(say(name), low, high, getattr(default, name), step,
                                         help=say(f"{name}_help"), key=name, **KEEP)
            values["max_new_tokens"] = st.number_input(
                say("max_new_tokens"), 0 if remote else 1, 100_000, 0 if remote else default.max_new_tokens,
                help=say("max_new_tokens_help") if remote else None,
                key="max_new_tokens_remote" if remote else "max_new_tokens", **KEEP)
            values["seed"] = st.number_input(say("seed"), -1, 2 ** 31 - 1, default.seed, help=say("seed_help"),
                                             key="seed", **KEEP)
            values["history"] = st.number_input(say("history"), 0, 100, default.history, key="history", **KEEP)
            values["run_tools"] = st.toggle(say("run_tools"), default.run_tools, key="run_tools", **KEEP)
            values["describe_tools"] = st.toggle(say("describe_tools"), default.describe_tools, key="describe_tools",
                                                 help=say("describe_tools_help"), **KEEP)
    return Settings(**{item.name: values[item.name] for item in fields(Settings)})


# --- what buttons do: they run before the page is drawn again


def exchanges():
    return st.session_state.setdefault("exchanges", [])


def running():
    return any(answer.running for exchange in exchanges()[-1:] for answer in exchange.answers)


def send(text=""):
    """Ask a question, an example or what was typed."""
    if running():                                          # sent before the page knew that an answer is coming
        stop()
    if exchanges() and not exchanges()[-1].answers:        # nobody could be asked that one
        exchanges().pop()
    exchanges().append(Exchange(text or st.session_state.message))


def stop():
    for answer in exchanges()[-1].answers:
        answer.stop()


def again():
    last = exchanges()[-1]
    exchanges()[-1] = Exchange(last.text, attempt=last.attempt + 1)


def start_editing():
    st.session_state.editing = True


def edited(keep):
    st.session_state.editing = False
    text = st.session_state.edited_text.strip()
    if keep and text:
        exchanges()[-1] = Exchange(text)


def forget():
    for answer in (answer for exchange in exchanges() for answer in exchange.answers):
        answer.stop()
    st.session_state.exchanges, st.session_state.editing = [], False


def better(file, chosen, rejected):
    keep(file, {"chosen": chosen, "rejected": rejected})


def rate(file, messages, key):
    if st.session_state[key] is not None:                  # None: a thumb was taken back
        keep(file, {"messages": messages, "label": bool(st.session_state[key])})


def keep(file, record):
    """Append a record to a jsonl."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8", newline="\n") as lines:
        lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    st.toast(say("rated", file=escaped(sources.shown(file))), icon=":material/check:")


# --- conversations


def conversation(exchanges, column, system=""):
    """The messages of one of the models. A question that got no answer is left out, unless it is the last."""
    messages = [{"role": "system", "content": system}] if system else []
    for exchange in exchanges:
        said = exchange.answers[min(column, len(exchange.answers) - 1)].messages if exchange.answers else []
        if said or exchange is exchanges[-1]:
            messages += [{"role": "user", "content": exchange.text}, *said]
    return messages


def export(exchanges, settings):
    """The conversation as lines of JSON, a record for each of the models: what trainers read, and how it was had."""
    columns = range(max(len(exchange.answers) for exchange in exchanges) or 1)
    return "".join(json.dumps({"messages": conversation(exchanges, column, settings.system),
                               "model": (exchanges[-1].names[column:] or [""])[0],
                               "settings": asdict(settings)}, ensure_ascii=False) + "\n" for column in columns)


def start(cfg, chosen, settings):
    """Let the answers to the last message be written. UserError where a model cannot be loaded."""
    exchange, writers = exchanges()[-1], []
    for column, (kind, *source) in enumerate(chosen):
        messages = conversation(exchanges(), column)
        if kind == "local":
            with st.spinner(say("loading")):
                writers.append(write_local(sources.load(*source, cfg), messages, settings))
        else:
            writers.append(write_remote(*source, messages, settings))
    seed = draw_seed(settings) + exchange.attempt
    exchange.names = [" + ".join(sources.shown(part) for part in source[1:] if part) if source[0] == "local" else
                      source[3] for source in chosen]
    exchange.answers = [Answer(write, seed) for write in writers]


# --- drawing


def draw_message(message, writing=False):
    """One message of an assistant or a tool. writing: more of it is to come."""
    if message["role"] == "tool":
        with st.expander(say("tool_result"), icon=":material/output:"):
            st.code(plain(message["content"]), language=None, wrap_lines=True)
        return
    if message.get("reasoning_content"):
        thinking = writing and not message.get("content")
        with st.expander(say("thinking_now" if thinking else "thought"), icon=":material/psychology:"):
            show(message["reasoning_content"])
    show(message.get("content") or "")
    show(message.get("answer") or "")
    for call in message.get("tool_calls") or []:
        with st.expander(say("tool_call"), icon=":material/build:", expanded=True):
            st.code(plain(json.dumps(call, ensure_ascii=False)), language="json", wrap_lines=True)


def draw_answer(answer):
    """An answer as far as it is written, and how fast that went."""
    for message in answer.messages:
        draw_message(message)
    if turn := answer.turn:
        draw_message(turn, writing=True)
    if answer.problem:
        show_problem(answer.problem)
    reason = "running" if answer.running else answer.reason if answer.reason in REASONS else "other"
    st.caption(say("figures", tokens=answer.tokens, speed=answer.tokens / max(answer.seconds, 1e-9), seed=answer.seed,
                   reason=say(f"reason_{reason}")))


def draw_exchange(exchange):
    """A message and its answers; returns the places of the answers if any of them was being written, else []."""
    going = any(answer.running for answer in exchange.answers)     # asked first: what is drawn is at least as late
    with st.chat_message("user", avatar=":material/person:"):
        show(exchange.text)
    if not exchange.answers:
        return []
    two = len(exchange.answers) > 1
    places = []
    for cell, answer, name in zip(st.columns(len(exchange.answers)), exchange.answers, exchange.names, strict=True):
        with cell, st.container(border=two), st.chat_message("assistant", avatar=":material/psychiatry:"):
            if two:
                st.badge(escaped(name), color="gray")
            places.append(st.empty())
            with places[-1].container():
                draw_answer(answer)
    return places if going else []


def draw_buttons(cfg, settings):
    """What can be done with the last exchange once it is answered."""
    number, exchange = len(exchanges()) - 1, exchanges()[-1]
    runs = sources.place(cfg.runs)
    before = conversation(exchanges(), 0, settings.system)
    before = before[:len(before) - len(exchange.answers[0].messages)] if exchange.answers else before
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(say("again"), icon=":material/refresh:", on_click=again, key="again")
        st.button(say("edit"), icon=":material/edit:", on_click=start_editing, key="edit")
        written = [answer.messages for answer in exchange.answers]
        if len(written) == 1 and written[0]:
            key = f"rating_{number}_{exchange.attempt}"
            st.feedback("thumbs", key=key, on_change=rate, args=(runs / "ratings.jsonl", before + written[0], key))
        elif len(written) == 2 and all(written):
            for side, icon in enumerate((":material/arrow_back:", ":material/arrow_forward:")):
                st.button(say("better"), icon=icon, key=f"better_{side}", on_click=better,
                          args=(runs / "comparisons.jsonl", before + written[side], before + written[1 - side]))


def draw_welcome():
    """Questions to begin with: what the built-in data teaches."""
    st.caption(say("welcome"))
    with st.container(horizontal=True):
        for number, text in enumerate(AUTO_PROMPTS):
            st.button(text, key=f"example_{number}", on_click=send, args=(text,))


def draw_editor():
    with st.form("editor"):
        st.text_area(say("edit_message"), exchanges()[-1].text, key="edited_text")
        with st.container(horizontal=True):
            st.form_submit_button(say("send"), type="primary", on_click=edited, args=(True,))
            st.form_submit_button(say("cancel"), on_click=edited, args=(False,))


def draw_conversation_buttons(settings):
    with st.sidebar:
        st.button(say("new_chat"), icon=":material/add_comment:", on_click=forget, width="stretch")
        if exchanges() and not running():
            st.download_button(say("export"), export(exchanges(), settings), "conversation.jsonl", "application/jsonl",
                               on_click="ignore", icon=":material/download:", width="stretch")


def follow(places, answers):
    """Redraw the answers that are being written until all have ended, then draw the page again."""
    while True:
        going = [answer.running for answer in answers]     # looked at first: what is drawn then is at least as late
        for place, answer in zip(places, answers, strict=True):
            with place.container():
                draw_answer(answer)
        if not any(going):
            st.rerun()
        time.sleep(REDRAW)


def page(cfg):
    try:
        chosen, problem = choose_sources(cfg), ""
    except UserError as error:
        chosen, problem = [], str(error)
    settings = choose_settings(remote=st.session_state.where == "server")
    st.title(say("chat"))
    if not problem and not all(source[1] for source in chosen):
        problem = say("no_model")
    if problem:
        show_problem(problem)
    if exchanges() and not exchanges()[-1].answers and not problem:
        try:
            start(cfg, chosen, settings)
        except UserError as error:
            show_problem(str(error))
    st.chat_input(say("message"), key="message", on_submit=send, disabled=running() or bool(problem))
    if not exchanges() and not problem:
        draw_welcome()
    places = []
    for exchange in exchanges():
        places = draw_exchange(exchange)
    draw_conversation_buttons(settings)
    if places:
        st.button(say("stop"), icon=":material/stop_circle:", on_click=stop, key="stop")
        follow(places, exchanges()[-1].answers)
    elif exchanges() and st.session_state.get("editing"):
        draw_editor()
    elif exchanges():
        draw_buttons(cfg, settings)
