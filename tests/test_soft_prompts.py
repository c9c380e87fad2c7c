"""Prompt and prefix tuning: equal to PEFT, and the same however a text is packed, padded, cached or cut."""

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from dataset.lm_dataset import SFTDataset
from eval.eval_loss import evaluate_loss
from model import device as devices
from model.adapters.adapted import AdapterConfig, attach, detach, disabled, merge, switch, unmerge
from model.adapters.folder import load_adapter, save_adapter
from model.adapters.soft_prompt import initial_embeddings, initial_table, keys_values_of, widened
from model.checkpoint import load_causal_lm, save_model
from model.config import ModelConfig
from model.errors import UserError
from model.generate import KVCache, SamplingParams, generate
from model.kernels import attention, segment_blocks
from model.logprobs import token_logprobs
from model.tokenizer import Tokenizer
from model.transformer import CausalLM, attention_mask_for
from tests.conftest import killed_after, write_chats
from tests.ranks_worker import run_job
from tests.test_ranks import together
from trainer import curves, train_lora

V, K = 97, 5                       # tokens of the vocabulary, virtual tokens
SHAPE = dict(vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)
METHODS = {"prompt": dict(method="prompt"), "prefix": dict(method="prefix"),
           "prefix through an MLP": dict(method="prefix", inner=24)}
FAMILIES = {"llama": {}, "qwen3": dict(qk_norm=True, head_dim=32), "window": dict(sliding_window=7),
            "moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, qk_norm=True)}
CLOSE = dict(atol=2e-5, rtol=1e-4)


def tiny(**changes):
    """A small model whose layers matter: larger weights than a fresh one's."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture(params=METHODS)
def method(request):
    return AdapterConfig(rank=K, **METHODS[request.param])


@pytest.fixture(params=FAMILIES)
def model(request, method):
    model = tiny(**FAMILIES[request.param])
    attach(model, method)
    return model


def texts_of(*lengths):
    torch.manual_seed(1)
    return [torch.randint(V, (length,)) for length in lengths]


@torch.no_grad()
def alone(model, text):
    """(T, V): the logits of a text by itself."""
    return model(text[None]).logits[0]


# --- the same in every layout


def test_virtual_tokens_change_what_the_model_says(model):
    text, = texts_of(9)
    with disabled(model):
        base = alone(model, text)
    assert (alone(model, text) - base).abs().max() > 0.1


@torch.no_grad()
def test_a_packed_row_gives_the_logits_of_its_texts_alone(model):
    texts = texts_of(6, 11, 3)
    ids = torch.cat([*texts, torch.zeros(4, dtype=torch.long)])[None]
    segments = torch.tensor([[1] * 6 + [2] * 11 + [3] * 3 + [0] * 4])
    positions = torch.cat([torch.arange(len(text)) for text in texts] + [torch.arange(4)])[None]
    got = model(ids, segment_ids=segments, positions=positions).logits[0]
    for text, part in zip(texts, got.split([6, 11, 3, 4]), strict=False):
        torch.testing.assert_close(part, alone(model, text), **CLOSE)
    assert got.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(model, side):
    short, long = texts_of(5, 12)
    pad = torch.full((7,), 3)
    row = torch.cat([pad, short] if side == "left" else [short, pad])
    mask = torch.ones(2, 12, dtype=torch.long)
    place = slice(7, 12) if side == "left" else slice(0, 5)
    mask[0] = 0
    mask[0, place] = 1
    got = model(torch.stack([row, long]), attention_mask=mask).logits
    torch.testing.assert_close(got[0, place], alone(model, short), **CLOSE)
    torch.testing.assert_close(got[1], alone(model, long), **CLOSE)


@pytest.mark.parametrize("chunk", [1, 3, 20])
@torch.no_grad()
def test_prefill_in_chunks_equals_one_uncached_forward(model, chunk):
    ids = torch.stack(texts_of(20, 20))
    cache = KVCache(model.config, 2, 20, "cpu", torch.float32)
    got = torch.cat([model(part, cache=cache).logits for part in ids.split(chunk, dim=1)], dim=1)
    torch.testing.assert_close(got, model(ids).logits, **CLOSE)
    assert cache.length == 20 and cache.virtual == K


@torch.no_grad()
def test_a_padded_batch_in_a_cache_goes_on_as_each_row_alone(model):
    texts = texts_of(4, 9)
    ids = torch.stack([nn.functional.pad(text, (9 - len(text), 0)) for text in texts])
    mask = torch.stack([torch.arange(9) >= 9 - len(text) for text in texts]).long()
    cache = KVCache(model.config, 2, 12, "cpu", torch.float32)
    model(ids, attention_mask=mask, cache=cache)
    new = torch.tensor([[5, 6, 7], [8, 9, 10]])
    mask = nn.functional.pad(mask, (0, 3), value=1)
    for i in range(3):                            # one token at a time
        got = model(new[:, i:i + 1], attention_mask=mask[:, :10 + i], cache=cache).logits[:, 0]
        for row, text in enumerate(texts):
            torch.testing.assert_close(got[row], alone(model, torch.cat([text, new[row, :i + 1]]))[-1], **CLOSE)


@torch.no_grad()
def test_generate_equals_the_whole_text_again_for_every_token(model):
    prompts = [text.tolist() for text in texts_of(3, 8, 5)]
    got = generate(model, prompts, SamplingParams(max_new_tokens=6, temperature=0.0))
    for prompt, (completion,) in zip(prompts, got, strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert completion.ids == ids[len(prompt):]


def test_sampled_logprobs_are_those_of_the_text(model):
    """Several samples of each prompt, rows that leave early, and a batch that is cut in two."""
    prompts = [text.tolist() for text in texts_of(3, 8, 5)]
    params = SamplingParams(max_new_tokens=8, seed=3, stop_ids=tuple(range(20)))
    got = generate(model, prompts, params, num_samples=4)
    assert len({len(completion.ids) for row in got for completion in row}) > 1            # some ended early
    for prompt, row in zip(prompts, got, strict=True):
        for completion in row:
            ids = torch.tensor([prompt + completion.ids])
            with torch.no_grad():
                logprobs, _ = token_logprobs(model, ids)
            sampled = torch.tensor(completion.logprobs)
            torch.testing.assert_close(logprobs[0, len(prompt):], sampled, atol=1e-4, rtol=1e-4)
    again = generate(model, prompts, params, num_samples=4, batch_size=4)
    assert [c.ids for row in again for c in row] == [c.ids for row in got for c in row]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_masks_of_a_gpu_let_the_same_slots_be_seen():
    """FlexAttention, which packed rows use on CUDA, against SDPA with the mask that is used elsewhere."""
    torch.manual_seed(0)
    segments = torch.tensor([[1] * 70 + [2] * 90 + [0] * 20, [1] * 180])
    q, k, v = (torch.randn(2, heads, length, 32) for heads, length in ((4, 180), (2, 185), (2, 185)))
    positions = torch.arange(180)[None] + K
    mask = widened(attention_mask_for(180, 0, "cpu", segment_ids=segments), K, 0, positions, 0)
    blocks = segment_blocks(segments, K)
    assert widened(blocks, K, 0, positions, 0) is blocks
    torch.testing.assert_close(attention(q, k, v, blocks), attention(q, k, v, mask), **CLOSE)


def test_a_cache_is_not_continued_under_other_virtual_tokens(model):
    cache = KVCache(model.config, 1, 8, "cpu", torch.float32)
    with disabled(model), torch.no_grad():
        model(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match="0 virtual tokens, now 5"):
        model(torch.tensor([[3]]), cache=cache)


# --- training


def gradients(model):
    """{name: gradient} of a loss over packed rows."""
    torch.manual_seed(2)
    ids = torch.randint(V, (2, 16))
    segments = torch.tensor([[1] * 9 + [2] * 7, [1] * 16])
    positions = torch.tensor([[*range(9), *range(7)], [*range(16)]])
    logprobs, aux = token_logprobs(model.train(), ids, None, segments, positions)
    model.zero_grad()
    (-logprobs.sum() + aux.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_only_the_virtual_tokens_learn(model):
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "soft_prompt" not in name}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(name.startswith("model.soft_prompt.adapters.default.") for name in trained)
    grads = gradients(model)
    assert sorted(grads) == sorted(trained) and all(grad.abs().max() > 0 for grad in grads.values())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())


def test_gradients_agree_with_differences(method):
    """In float64, at one entry of each trained tensor."""
    model = tiny(qk_norm=True).double()
    attach(model, method)
    grads, step = gradients(model), 1e-5

    def loss():
        torch.manual_seed(2)
        ids = torch.randint(V, (2, 16))
        segments = torch.tensor([[1] * 9 + [2] * 7, [1] * 16])
        positions = torch.tensor([[*range(9), *range(7)], [*range(16)]])
        with torch.no_grad():
            return -token_logprobs(model, ids, None, segments, positions)[0].sum()

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            entry, index = parameter.detach().view(-1), parameter.numel() // 2
            start = entry[index].item()
            entry[index] = start + step
            high = loss()
            entry[index] = start - step
            low = loss()
            entry[index] = start
            slope = ((high - low) / (2 * step)).item()
            assert grads[name].view(-1)[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_activation_checkpointing_gives_the_same_gradients(model):
    expected = gradients(model)
    model.model.activation_checkpointing = True
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast_gives_finite_gradients_near_those_in_float32(method):
    model = tiny()
    attach(model, method)
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(model)
    for name, gradient in got.items():
        assert (gradient - expected[name]).norm() < 0.1 * expected[name].norm()


def test_experts_do_not_count_virtual_tokens():
    """The load that balances experts, and their balance loss, are about texts."""
    model = tiny(**FAMILIES["moe"])
    attach(model, AdapterConfig("prompt", rank=K))
    model.train()
    model(torch.stack(texts_of(10, 10)))
    for block in model.model.layers:
        assert int(block.mlp.gate.load.sum()) == 2 * 10 * 2


# --- how they begin


def test_embeddings_begin_as_asked(method):
    model = tiny()
    table = model.model.embed_tokens.weight
    assert torch.equal(initial_embeddings(model.model, 5, "text", (7, 8)), table[[7, 8, 7, 8, 7]])
    drawn = initial_embeddings(model.model, 5, "vocabulary")
    assert all((table == row).all(1).any() for row in drawn)
    assert initial_embeddings(model.model, 400, "random").std() == pytest.approx(table.std().item(), rel=0.1)
    with pytest.raises(UserError, match="the text is empty"):
        initial_embeddings(model.model, 5, "text")
    with pytest.raises(UserError, match="random, vocabulary or text, not as 'words'"):
        initial_embeddings(model.model, 5, "words")


@torch.no_grad()
def test_a_prefix_that_begins_as_a_text_is_that_text_in_front():
    """The keys and values of real tokens: the model says what it would say after them."""
    model, (front, text) = tiny(qk_norm=True), texts_of(K, 9)
    expected = alone(model, torch.cat([front, text]))[K:]
    for name in ("prefix", "prompt"):
        attach(model, AdapterConfig(name, rank=K, start="text", start_ids=tuple(front.tolist())), name)
        torch.testing.assert_close(alone(model, text), expected, **CLOSE)
    assert initial_table(model.model, 3, "random").shape == (3, 3 * 2 * 2 * 16)


# --- PEFT


def hf_model(family):
    torch.manual_seed(0)
    model = {"llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
             "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, head_dim=32)),
             "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=7)),
             }[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def peft_config(config):
    if config.method == "prompt":
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=K)
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=K, prefix_projection=config.inner > 0,
                                   encoder_hidden_size=config.inner or None)


def peft_logits(model, ids, method):
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[:, K:] if method.method == "prompt" else logits


def own_parameters(theirs, ours):
    """PEFT's parameters next to ours."""
    theirs, ours = theirs.prompt_encoder["default"], ours.model.soft_prompt.adapters["default"]
    pairs = [(theirs.embedding.weight, ours.table)]
    if hasattr(theirs, "transform"):
        pairs += zip(theirs.transform.parameters(), ours.transform.parameters(), strict=True)
    return pairs


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_outputs_and_gradients_are_those_of_peft(family, method, tmp_path):
    base = hf_model(family)
    base.save_pretrained(tmp_path)
    ours = load_causal_lm(tmp_path)
    attach(ours, method)
    theirs = peft.get_peft_model(base, peft_config(method)).eval()
    pairs = own_parameters(theirs, ours)
    with torch.no_grad():
        for source, target in pairs:
            target.copy_(source)
    ids = torch.stack(texts_of(11, 11))
    expected, got = peft_logits(theirs, ids, method), ours(ids).logits
    torch.testing.assert_close(got, expected, **CLOSE)
    weights = torch.randn_like(got)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    for source, target in pairs:
        torch.testing.assert_close(target.grad, source.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_peft_loads_our_folder(family, method, tmp_path):
    base = hf_model(family)
    base.save_pretrained(tmp_path / "base")
    ours = load_causal_lm(tmp_path / "base")
    attach(ours, method)
    for parameter in ours.model.soft_prompt.parameters():
        parameter.copy_(torch.randn_like(parameter))
    save_adapter(tmp_path / "ours", ours, base=tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    ids = torch.stack(texts_of(11, 11))
    torch.testing.assert_close(ours(ids).logits, peft_logits(theirs, ids, method), **CLOSE)
    again = load_causal_lm(tmp_path / "base")                        # and we do
    config = load_adapter(again, tmp_path / "ours")
    torch.testing.assert_close(again(ids).logits, ours(ids).logits, **CLOSE)
    assert (config.method, config.rank) == (method.method, K)


@torch.no_grad()
def test_we_load_the_folder_of_peft(method, tmp_path):
    base = hf_model("llama")
    base.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base, peft_config(method)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_causal_lm(tmp_path / "base")
    load_adapter(ours, tmp_path / "theirs")
    ids = torch.stack(texts_of(11, 11))
    torch.testing.assert_close(ours(ids).logits, peft_logits(theirs, ids, method), **CLOSE)
    expected = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                               eos_token_id=None, pad_token_id=0)
    got = generate(ours, ids.tolist(), SamplingParams(max_new_tokens=8, temperature=0.0))
    assert [completion.ids for completion, in got] == expected[:, -8:].tolist()


def test_a_folder_for_another_model_is_refused(method, tmp_path):
    model = tiny()
    attach(model, method)
    save_adapter(tmp_path / "ours", model)
    with pytest.raises(UserError, match=r"prompt_embeddings has shape .* for another model"):
        load_adapter(tiny(hidden_size=96, head_dim=32), tmp_path / "ours")
    path = tmp_path / "ours" / "adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace("_TUNING", "_GUESSING"), encoding="utf-8")
    with pytest.raises(UserError, match="an adapter of type P.*_GUESSING; known are"):
        load_adapter(tiny(), tmp_path / "ours")


# --- beside other adapters


@torch.no_grad()
def test_several_adapters_are_switched_and_taken_off_without_touching_the_base(method):
    model, (text,) = tiny(), texts_of(9)
    bytes_before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = alone(model, text)
    attach(model, method, "soft")
    soft = alone(model, text)
    attach(model, AdapterConfig("lora", rank=4), "low")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_()
    low = alone(model, text)
    attach(model, AdapterConfig(rank=2, **METHODS["prompt"]), "short")
    assert not torch.equal(low, base) and not torch.equal(soft, base)
    switch(model, "low")
    assert torch.equal(alone(model, text), low)
    switch(model, "soft")
    assert torch.equal(alone(model, text), soft)
    with disabled(model):
        assert torch.equal(alone(model, text), base)
    assert torch.equal(alone(model, text), soft)
    with pytest.raises(UserError, match="'soft' changes more than weights: it cannot be merged"):
        merge(model, "soft")
    merge(model, "low")
    torch.testing.assert_close(alone(model, text), low, atol=1e-3, rtol=1e-3)
    unmerge(model)
    switch(model, None)
    assert torch.equal(alone(model, text), base)
    detach(model)
    assert model.model.soft_prompt is None and torch.equal(alone(model, text), base)
    assert model.state_dict().keys() == bytes_before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in bytes_before.items())


@torch.no_grad()
def test_keys_and_values_are_those_that_a_cache_would_hold():
    model, (text,) = tiny(qk_norm=True), texts_of(K)
    cache = KVCache(model.config, 1, K, "cpu", torch.float32)
    model(text[None], cache=cache)
    got = keys_values_of(model.model, model.model.embed_tokens(text))
    torch.testing.assert_close(got, cache.store[:, :, 0], **CLOSE)


# --- through the train script


RUN = dict(max_len=48, batch_size=7, micro_batch_size=4, log_every=1, eval_every=0, sample_every=0, save_every=2,
           device="cpu", warmup_steps=2, max_steps=6, lora_rank=4, lr=0.05)
SCRIPT = {"prompt": dict(method="prompt"), "prompt that begins as a text": dict(method="prompt", virtual_text="a cat"),
          "prefix": dict(method="prefix"), "prefix through an MLP": dict(method="prefix", prefix_inner=8),
          "bottleneck": dict(method="bottleneck")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with conversations and a model to start from."""
    folder = tmp_path_factory.mktemp("soft")
    write_chats(folder / "chats.jsonl")
    torch.manual_seed(0)
    tokenizer = Tokenizer.load("nano")
    model = CausalLM(ModelConfig(**{**SHAPE, "vocab_size": tokenizer.vocab_size, "num_hidden_layers": 2}))
    save_model(folder / "base", model, tokenizer)
    return folder


def train(place, out, **changes):
    return train_lora.main(train_lora.Config(**{**RUN, "model": str(place / "base"), "data": str(place / "chats.jsonl"),
                                                "out": str(out), **changes}))


def saved(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", SCRIPT)
def test_a_killed_run_continues_to_the_same_bits(name, place, tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "report", lambda folder: None)          # both are slow
    monkeypatch.setattr(devices, "matmul_peak", lambda *_: 1e12)
    flags, base = SCRIPT[name], (place / "base" / "model.safetensors").read_bytes()
    summary = train(place, tmp_path / "whole", **flags)
    with killed_after(5):
        train(place, tmp_path / "killed", **flags)
    train(place, tmp_path / "killed", **flags)
    killed, whole = saved(tmp_path / "killed"), saved(tmp_path / "whole")
    assert killed.keys() == whole.keys() and all(torch.equal(killed[key], whole[key]) for key in whole)
    assert (place / "base" / "model.safetensors").read_bytes() == base
    model = load_causal_lm(place / "base")                              # and the folder holds what was measured
    tokenizer = Tokenizer.load(place / "base")
    load_adapter(model, tmp_path / "whole")
    val = SFTDataset(place / "chats.jsonl", tokenizer, 48, "val")
    scores = evaluate_loss(model, val, tokenizer, torch.device("cpu"))
    assert scores["loss"] == pytest.approx(summary["held_out"]["loss"], rel=2e-2)     # bfloat16 while training
    with disabled(model):
        assert evaluate_loss(model, val, tokenizer, torch.device("cpu"))["loss"] != scores["loss"]


@pytest.mark.parametrize("flags, message", [
    (dict(method="lora", virtual_text="a"), "--virtual_text: is for --method prompt and prefix, not for lora"),
    (dict(method="prompt", prefix_inner=4), "--prefix_inner 4: is for --method prefix"),
    (dict(method="prefix", prefix_inner=4, virtual_text="a"), "begins at random, not as --virtual_text"),
])
def test_flags_of_another_method_are_refused(flags, message, place, tmp_path):
    with pytest.raises(UserError, match=message):
        train(place, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_two_ranks_learn_what_one_does(place):
    """The reduced gradient of every step, in float64: virtual tokens stand before the texts of both ranks."""
    flags = {**RUN, "model": str(place / "base"), "data": str(place / "chats.jsonl"), "max_steps": 3,
             "dtype": "float64", "micro_batch_size": 2}
    jobs = [{"name": f"{name} {how}", "script": "train_lora",
             "flags": {**flags, **SCRIPT[name], "parallel": how, "out": str(place / f"{name} {how}")}}
            for name, how in [("prompt", "fsdp"), ("prefix through an MLP", "ddp"), ("bottleneck", "ddp")]]
    got = together(place, jobs)
    for job in jobs:
        job["flags"]["out"] += " alone"
        alone = run_job(place, **job)
        for ours, *theirs in zip(alone["gradients"], *(rank["gradients"] for rank in got[job["name"]]), strict=True):
            assert all((ours - one).norm() <= 1e-6 * ours.norm() for one in theirs)
