"""Folders saved here in stock transformers, as anybody would use them: pipelines, generate with the chat template, and
the classifier of a reward model. Nothing of this project is imported there, and no remote code is trusted."""

import json

import pytest
import torch
import transformers

from model.checkpoint import load_model, load_reward_model, save_model
from model.config import ModelConfig
from model.generate import SamplingParams, generate
from model.heads import ScalarModel
from model.tokenizer import Tokenizer
from model.transformer import CausalLM

QWEN3 = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=256, initializer_range=0.3)
SHAPES = {"qwen3": QWEN3, "llama": QWEN3 | {"qk_norm": False},
          "qwen3_moe": QWEN3 | dict(num_experts=4, moe_intermediate_size=32),
          "dots1": QWEN3 | dict(num_experts=4, moe_intermediate_size=32, num_shared_experts=1, router="sigmoid")}
CHAT = [{"role": "system", "content": "You are kind."}, {"role": "user", "content": "Who are you? 你好"}]
COUNT = 24


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    tokenizer = Tokenizer.load("nano")
    save_model(path, CausalLM(ModelConfig(tokenizer.vocab_size, **SHAPES[request.param])), tokenizer)
    return str(path)


def ours(folder, messages=None, text=""):
    """Ids of a prompt and of our greedy continuation, its end token included."""
    model, tokenizer = load_model(folder)
    ids = tokenizer.render(messages, add_generation_prompt=True)[0] if messages else tokenizer.encode(text)
    [[completion]] = generate(model, [ids], SamplingParams(COUNT, 0.0), tokenizer)
    return ids, list(completion.ids), tokenizer


def test_pipeline_with_chat_messages(folder):
    """The text that pipeline("text-generation") answers with is ours."""
    _, written, tokenizer = ours(folder, CHAT)
    pipe = transformers.pipeline("text-generation", model=folder, device="cpu", dtype=torch.float32)
    [answer] = pipe(CHAT, max_new_tokens=COUNT, do_sample=False)
    reply = answer["generated_text"][-1]
    assert answer["generated_text"][:-1] == CHAT and reply["role"] == "assistant"
    assert reply["content"] == tokenizer.decode(written) and len(written) > 1


def test_pipeline_with_plain_text(folder):
    text = "Once upon a time"
    _, written, tokenizer = ours(folder, text=text)
    pipe = transformers.pipeline("text-generation", model=folder, device="cpu", dtype=torch.float32)
    [answer] = pipe(text, max_new_tokens=COUNT, do_sample=False)
    assert answer["generated_text"] == text + tokenizer.decode(written)


def test_generate_with_the_chat_template(folder):
    """Alone and, padded on the left, in a batch: ids of prompts and answers."""
    others = [{"role": "user", "content": "hi"}]
    (ids, written, tokenizer), (other_ids, other_written, _) = ours(folder, CHAT), ours(folder, others)
    stock = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = stock.apply_chat_template([CHAT, others], add_generation_prompt=True, return_tensors="pt", return_dict=True,
                                      padding=True)
    assert batch["input_ids"][0].tolist() == ids
    assert batch["input_ids"][1].tolist() == [tokenizer.pad_id] * (len(ids) - len(other_ids)) + other_ids
    out = model.generate(**batch, max_new_tokens=COUNT, do_sample=False)[:, len(ids):].tolist()
    for row, expected in zip(out, (written, other_written), strict=True):
        assert row[:len(expected)] == expected and set(row[len(expected):]) <= {tokenizer.pad_id}


def test_generation_stops_where_ours_does(folder):
    """Both ends, of a document and of a turn, end an answer there too: a head that can only say one of them."""
    model, tokenizer = load_model(folder)
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert set(tokenizer.stop_ids) == set(stock.generation_config.eos_token_id)
    assert stock.generation_config.pad_token_id == tokenizer.pad_id
    for end in tokenizer.stop_ids:
        only = transformers.SuppressTokensLogitsProcessor([i for i in range(tokenizer.vocab_size) if i != end])
        out = stock.generate(torch.tensor([[5, 6]]), max_new_tokens=9, do_sample=False,
                             logits_processor=transformers.LogitsProcessorList([only]))
        assert out.tolist() == [[5, 6, end]]


def test_the_stock_tokenizer_gives_a_model_what_it_takes(folder):
    """Without model_input_names transformers 4 adds token_type_ids, which generate refuses."""
    stock = transformers.AutoTokenizer.from_pretrained(folder)
    assert set(stock("hello")) == {"input_ids", "attention_mask"}
    with open(f"{folder}/tokenizer_config.json", encoding="utf-8") as file:
        assert json.load(file)["model_input_names"] == ["input_ids", "attention_mask"]
    assert stock("Hello 你好  x\n")["input_ids"] == Tokenizer.load(folder).encode("Hello 你好  x\n")


def test_a_reward_model_is_a_classifier_with_one_label(tmp_path):
    torch.manual_seed(0)
    tokenizer = Tokenizer.load("nano")
    model = ScalarModel(ModelConfig(tokenizer.vocab_size, **QWEN3))
    torch.nn.init.normal_(model.score.weight, std=0.5)
    save_model(tmp_path, model, tokenizer)
    turns = [*CHAT, {"role": "assistant", "content": "I am Acorn."}]
    ids = tokenizer.render(turns)[0]
    loaded, _ = load_reward_model(tmp_path)
    with torch.no_grad():
        expected = loaded(torch.tensor([ids])).logits[0, -1].item()
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert stock(torch.tensor([ids])).logits.item() == pytest.approx(expected, abs=1e-4)
    pipe = transformers.pipeline("text-classification", model=str(tmp_path), device="cpu", function_to_apply="none",
                                 dtype=torch.float32)
    text = tokenizer.decode(ids, skip_special=False)
    [answer] = pipe(text)
    assert answer["label"] == "reward" and answer["score"] == pytest.approx(expected, abs=1e-4)
