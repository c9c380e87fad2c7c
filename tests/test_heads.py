"""The scalar head against transformers' sequence classifiers, both directions; padding and packing change no score."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from model.checkpoint import load_causal_lm, load_reward_model, save_model
from model.config import ModelConfig
from model.errors import UserError
from model.heads import ScalarModel, at_last_token, at_segment_ends, normalize
from model.tokenizer import Tokenizer
from model.transformer import CausalLM

TOKENIZER = Tokenizer.load("nano")
V, PAD = TOKENIZER.vocab_size, TOKENIZER.pad_id
SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
IDS_OF_HF = dict(pad_token_id=PAD, bos_token_id=TOKENIZER.bos_id, eos_token_id=TOKENIZER.eos_id)
FAMILIES = {
    "llama": transformers.LlamaConfig(**SHAPE, **IDS_OF_HF),
    "llama tied": transformers.LlamaConfig(**SHAPE, **IDS_OF_HF, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SHAPE, **IDS_OF_HF, sliding_window=7),
    "qwen2": transformers.Qwen2Config(**SHAPE, **IDS_OF_HF),
    "qwen3": transformers.Qwen3Config(**SHAPE, **IDS_OF_HF, head_dim=16),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SHAPE, **IDS_OF_HF, num_experts=4, num_experts_per_tok=2,
                                             moe_intermediate_size=16, norm_topk_prob=True),
}
OURS = {
    "qwen3": ModelConfig(**SHAPE),
    "llama": ModelConfig(**SHAPE, qk_norm=False, tie_word_embeddings=False),
    "qwen2": ModelConfig(**SHAPE, qk_norm=False, qkv_bias=True),
}


@torch.no_grad()
def randomise(model):
    """Weights large enough that every part of the model moves the score."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.normal(1.0 if "norm" in name else 0.0, 0.15, tensor.shape))
    return model.eval()


def texts(seed=1):
    """Ragged lists of ids without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(12, V, (size,), generator=generator).tolist() for size in (9, 3, 14, 1, 6)]


def padded(lists, side):
    """(ids, attention mask) of lists of ids, padded left or right, one slot more than needed."""
    width = max(map(len, lists)) + 1
    fill = [[PAD] * (width - len(ids)) for ids in lists]
    ids = [ids + gap if side == "right" else gap + ids for ids, gap in zip(lists, fill, strict=True)]
    ids = torch.tensor(ids)
    return ids, (ids != PAD).long()


@torch.no_grad()
def scores(model, lists, side="right"):
    ids, mask = padded(lists, side)
    return at_last_token(model(ids, mask).logits, mask)


def refusal(folder):
    with pytest.raises(UserError) as error:
        load_reward_model(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------------- transformers, both ways


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_reward_model_of_transformers_scores_the_same_here(name, tmp_path):
    FAMILIES[name].num_labels = 1
    oracle = randomise(transformers.AutoModelForSequenceClassification.from_config(FAMILIES[name]))
    oracle.save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    model, _ = load_reward_model(tmp_path)
    for side in ("right", "left"):
        ids, mask = padded(texts(), side)
        expected = oracle(ids, attention_mask=mask).logits[:, 0]
        assert expected.std() > 0.05
        assert torch.allclose(at_last_token(model(ids, mask).logits, mask), expected, atol=1e-5)


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_ours_loads_in_stock_transformers_and_scores_the_same(name, tmp_path):
    model = randomise(ScalarModel(OURS[name]))
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    save_model(tmp_path, model, TOKENIZER)
    oracle, report = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path,
                                                                                     output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert oracle.num_labels == 1 and type(oracle).__name__.endswith("ForSequenceClassification")
    for side in ("right", "left"):
        ids, mask = padded(texts(), side)
        expected = oracle.eval()(ids, attention_mask=mask).logits[:, 0]
        assert torch.allclose(scores(model, texts(), side), expected, atol=1e-5)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    batch = hf_tokenizer(["a cat", "the old tower and the river"], padding=True, return_tensors="pt")
    lists = [TOKENIZER.encode(text) for text in ("a cat", "the old tower and the river")]
    assert torch.allclose(oracle(**batch).logits[:, 0], scores(model, lists), atol=1e-5)


def test_a_folder_of_ours_comes_back_as_it_was(tmp_path):
    model = randomise(ScalarModel(ModelConfig(**SHAPE)))
    model.config.reward_mean, model.config.reward_std = -0.25, 1.5
    save_model(tmp_path, model, TOKENIZER)
    again, _ = load_reward_model(tmp_path)
    assert torch.equal(scores(model, texts()), scores(again, texts()))
    assert normalize(1.25, again.config) == 1.0 and normalize(1.25, ModelConfig(**SHAPE)) == 1.25
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="Qwen3ForSequenceClassification; needed here is a language model"):
        load_causal_lm(tmp_path)


# --------------------------------------------------------------------------------------- from a language model


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_lends_its_decoder_and_the_head_is_fresh(tied, tmp_path):
    parent = randomise(CausalLM(ModelConfig(**SHAPE, tie_word_embeddings=tied)))
    save_model(tmp_path, parent, TOKENIZER)
    torch.manual_seed(3)
    model, _ = load_reward_model(tmp_path)
    assert not model.training and all(p.requires_grad for p in model.parameters())
    for name, tensor in parent.model.state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name]), name
    torch.manual_seed(4)
    another, _ = load_reward_model(tmp_path)
    assert not torch.equal(model.score.weight, another.score.weight)


def test_the_fresh_head_has_its_size():
    """N(0, 1 / sqrt(D + 1)): over a hidden state of length sqrt(D) a score of size 1."""
    torch.manual_seed(0)
    model = ScalarModel(ModelConfig(**{**SHAPE, "hidden_size": 4096, "num_hidden_layers": 1, "head_dim": 32,
                                       "vocab_size": 32}))
    assert model.score.weight.shape == (1, 4096) and model.score.bias is None
    assert model.score.weight.std().item() == pytest.approx(1 / 4097**0.5, rel=0.05)
    assert abs(model.score.weight.mean().item()) < 0.001


# --------------------------------------------------------------------------------------- padding, packing


def test_padding_and_batch_mates_change_no_score():
    model = randomise(ScalarModel(ModelConfig(**SHAPE)))
    alone = torch.cat([scores(model, [ids]) for ids in texts()])
    assert alone.std() > 0.05
    for side in ("right", "left"):
        assert torch.allclose(scores(model, texts(), side), alone, atol=1e-5)
    order = [3, 0, 4, 2, 1]
    assert torch.allclose(scores(model, [texts()[i] for i in order]), alone[order], atol=1e-5)


@torch.no_grad()
def test_texts_in_one_row_score_as_alone():
    model = randomise(ScalarModel(ModelConfig(**SHAPE)))
    lists = texts()
    ids = torch.tensor([sum(lists, []) + [PAD] * 3, sum(lists[:2], []) + [PAD] * 24])             # (2, T)
    segments = [[number for number, text in enumerate(row, 1) for _ in text] for row in (lists, lists[:2])]
    segments = torch.tensor([row + [0] * (ids.shape[1] - len(row)) for row in segments])
    places = [[place for text in row for place in range(len(text))] for row in (lists, lists[:2])]
    places = torch.tensor([row + [0] * (ids.shape[1] - len(row)) for row in places])
    ends = at_segment_ends(model(ids, None, segments, places).logits, segments, 6)
    assert ends.shape == (2, 6)
    alone = torch.cat([scores(model, [text]) for text in lists])
    assert torch.allclose(ends[0, :5], alone, atol=1e-5) and torch.allclose(ends[1, :2], alone[:2], atol=1e-5)


def test_the_end_of_a_segment_is_its_last_token():
    values = torch.arange(8.0)[None]
    assert at_segment_ends(values, torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0]]), 4).tolist() == [[2, 3, 5, 0]]
    assert at_last_token(values.expand(3, 8), torch.tensor([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 0], [0] * 7 + [1]])
                         ).tolist() == [7, 6, 7]


# --------------------------------------------------------------------------------------- what is refused


def test_other_folders_are_refused_in_one_line(tmp_path):
    model = ScalarModel(ModelConfig(**SHAPE))
    save_model(tmp_path, model, TOKENIZER)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    for changes, message in [
        ({"architectures": ["Qwen3ForTokenClassification"]}, "Qwen3ForTokenClassification; needed here is a reward"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "a classifier with 3 labels"),
        ({"id2label": None, "num_labels": 5}, "a classifier with 5 labels"),
        ({"id2label": None}, "a classifier with 2 labels"),
    ]:
        path.write_text(json.dumps({key: value for key, value in {**good, **changes}.items() if value is not None}))
        assert message in refusal(tmp_path)
    path.write_text(json.dumps(good))
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "score.bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "score.bias is no part of the model" in refusal(tmp_path)
    save_file({k: v for k, v in weights.items() if k != "score.weight"}, tmp_path / "model.safetensors")
    assert "score.weight (1, 32) is missing" in refusal(tmp_path)


def test_a_mixture_that_transformers_has_no_classifier_for_comes_back_here(tmp_path):
    config = ModelConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=16,
                         router="sigmoid")
    model = randomise(ScalarModel(config))
    save_model(tmp_path, model, TOKENIZER)
    assert torch.equal(scores(model, texts()), scores(load_reward_model(tmp_path)[0], texts()))
