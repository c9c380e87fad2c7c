"""GRPO, SPO and PPO as scripts, in-process: they learn what is rewarded and nothing else, continue exactly, and say
in one line what cannot be."""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dataset.lm_dataset import PromptDataset, SFTDataset, collate, load_rows
from model import device as devices
from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.distill import token_distances
from model.errors import UserError
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from tests.conftest import killed_after
from trainer import curves, dashboard, experience, rewards, runtime, train_grpo, train_ppo, train_spo
from trainer.rollout import from_rows

NANO = Tokenizer.load("nano")
YES, NO, END = NANO.encode("y")[0], NANO.encode("n")[0], NANO.end_of_turn_id
SCRIPTS = {"grpo": train_grpo, "spo": train_spo, "ppo": train_ppo}
TINY = dict(max_len=64, batch_size=8, max_new_tokens=4, max_steps=4, warmup_steps=2, lr=1e-2, dtype="float32",
            device="cpu", replay=0.0, min_pass=0.0, gate_prompts=2, pass_k=2, log_every=1, eval_every=0, sample_every=0,
            save_every=0)
OWN = {"grpo": dict(num_generations=4, beta=0.0), "spo": dict(pool=20, offline=2, beta=0.0),
       "ppo": dict(critic_warmup=2, critic_lr=1e-2)}
TIMES = ("tokens_per_second", "minutes", "mfu", "memory_gb")


def undecided(**changes):
    """A policy that says y with probability 0.3 or n with 0.7, and ends; what is left, one in a hundred, is noise.

    Every token has a 1 in its first coordinate, y and n have one in the second, and the head looks at these two.
    """
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(NANO.vocab_size, 32, 64, 1, 2, 1, head_dim=32, tie_word_embeddings=False, **changes))
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[:, 0], embedding[[YES, NO], 1] = 1.0, 1.0
        head[YES, 0], head[NO, 0], head[END, 1] = 2.0, 2.15, 4.0
    return model.eval()


def write_prompts(path, count=24, answer="y", checker="exact", prefix="", **more):
    """A jsonl of prompts of several lengths."""
    rows = [{"conversations": [{"role": "user", "content": prefix + "what now " * (1 + i % 5) + str(i)}],
             **({"answer": answer, "checker": checker} if checker else {}), **more} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_chats(path):
    """A jsonl of conversations to replay."""
    turns = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "n " * (1 + i % 4)}]
             for i in range(12)]
    path.write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a policy, prompts, and conversations to replay."""
    folder = tmp_path_factory.mktemp("rl")
    save_model(folder / "base", undecided(), NANO)
    write_prompts(folder / "prompts.jsonl")
    write_prompts(folder / "open.jsonl", checker=None)
    write_chats(folder / "chats.jsonl")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No curves and no measurement of the machine: they take longer than the runs here."""
    monkeypatch.setattr(curves, "report", lambda *_: None)
    monkeypatch.setattr(devices, "matmul_peak", lambda *_: 1e12)


def train(name, place, out, **changes):
    flags = {**TINY, **OWN[name], "model": str(place / "base"), "data": str(place / "prompts.jsonl"), "out": str(out),
             **changes}
    return SCRIPTS[name].main(SCRIPTS[name].Config(**flags))


def metrics(folder):
    """metrics.jsonl but for what depends on the clock."""
    lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def numbers(entry):
    """An entry of metrics.jsonl without its intervals."""
    return {key: value for key, value in entry.items() if not isinstance(value, list)}


def steps_of(folder):
    return [entry for entry in metrics(folder) if "lr" in entry]


def held_out(folder):
    return [entry for entry in metrics(folder) if "val_loss" in entry]


def weights(folder):
    return {k: v.clone() for k, v in load_model(folder)[0].state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def kept(folder):
    """What a method keeps besides the policy, after the last step."""
    path, = Path(folder, "resume").glob("step-*/algorithm.pt")
    return torch.load(path, weights_only=True)


# ------------------------------------------------------------------------------------------------- learning


LONG = {name: dict(max_steps=30, batch_size=16, gate_prompts=4, pass_k=8, val_fraction=0.3, log_every=30,
                   warmup_steps=1) for name in SCRIPTS}
LONG["ppo"] |= dict(batch_size=32, lr=5e-3, beta=0.1)        # it learns four times from a step, at the end from noise


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_rewarded_is_learnt(name, place, tmp_path):
    train(name, place, tmp_path / "run", **LONG[name])
    first, last = held_out(tmp_path / "run")
    assert first["val_accuracy"] == 0 and 0.1 < first["val_pass_1"] < 0.5
    assert last["val_accuracy"] == 1 and last["val_pass_1"] > 0.9
    assert last["val_accuracy_interval"][0] > 0.5 and last["val_entropy"] < first["val_entropy"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "metrics.jsonl", "summary.json", "train_config.json", "resume"} <= names


@pytest.mark.parametrize("name", SCRIPTS)
def test_control_a_reward_by_lot_teaches_nothing(name, place, tmp_path):
    train(name, place, tmp_path / "run", reward="random", **LONG[name])
    first, last = held_out(tmp_path / "run")
    assert not same(weights(place / "base"), weights(tmp_path / "run"))
    assert last["val_accuracy"] == 0 and last["val_pass_1"] < 0.6


@pytest.mark.parametrize("loss", train_grpo.VARIANTS)
def test_control_equal_rewards_leave_every_bit_of_the_weights(loss, place, tmp_path):
    train("grpo", place, tmp_path / "run", reward="constant", loss=loss)
    assert same(weights(place / "base"), weights(tmp_path / "run"))
    assert all(entry["degenerate"] == 1 and entry["grad_norm"] == 0 for entry in steps_of(tmp_path / "run"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_prompts_without_checkers_are_learnt_from_by_a_function_of_ones_own(name, place, tmp_path):
    """Nothing says right or wrong: no gate, and the held-out reward is the headline."""
    (tmp_path / "mine.py").write_text("def liked(texts, items):\n    return [float('y' in text) for text in texts]\n")
    train(name, place, tmp_path / "run", data=str(place / "open.jsonl"), reward=f"{tmp_path / 'mine.py'}:liked",
          **LONG[name])
    first, last = held_out(tmp_path / "run")
    assert first["val_reward"] < 0.6 and last["val_reward"] > 0.9 and "val_accuracy" not in last
    assert last["val_loss"] == -last["val_reward"] and "reward" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_overfit_batch_asks_the_same_prompts_again_and_again(name, place, tmp_path, monkeypatch):
    asked, act = [], experience.act
    monkeypatch.setattr(experience, "act", lambda run, sampler, tokenizer, items, *args: asked.append(
        [item["row"] for item in items]) or act(run, sampler, tokenizer, items, *args))
    train(name, place, tmp_path / "run", overfit_batch=True)
    assert len(asked) == 4 and all(rows == asked[0] for rows in asked)


def test_where_rewards_say_nothing_replay_leaves_the_policy_as_it_is(place, tmp_path):
    """Bit by bit, through an adapter too: KL(reference‖π) has no gradient at π = reference."""
    options = dict(reward="constant", replay_data=str(place / "chats.jsonl"), max_steps=3, beta=0.0)
    train("grpo", place, tmp_path / "all", replay=1.0, **options)
    assert same(weights(tmp_path / "all"), weights(place / "base"))
    train("grpo", place, tmp_path / "adapter", replay=1.0, lora_rank=2, **options)
    added = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any(value.any() for key, value in added.items() if "lora_B" in key)


@pytest.mark.parametrize("rank", [0, 2])
def test_replay_holds_what_is_not_practised(rank, place, tmp_path):
    """The same steps of learning, with and without: the conversations are as likely as before. An adapter's reference
    is the model below it."""
    far = []
    for weight in (0.0, 3.0):
        train("grpo", place, tmp_path / f"{weight}", **{
            **LONG["grpo"], "replay": weight, "max_steps": 15, "lr": 3e-2 if rank else 5e-3, "lora_rank": rank,
            "replay_data": str(place / "chats.jsonl")})
        batch = collate(list(load_rows(SFTDataset, place / "chats.jsonl", NANO, 64, "all")))
        base, trained = place / "base", tmp_path / f"{weight}"
        policy = load_model(base, adapter=str(trained))[0] if rank else load_model(trained)[0]
        models = policy, load_model(base)[0]
        with torch.no_grad():
            _, distances, _ = token_distances(*models, batch["input_ids"], batch["segment_ids"], batch["positions"])
        far.append(float((distances * batch["loss_mask"]).sum()))
    assert far[1] < 0.3 * far[0]


def test_replay_as_fine_tuning_teaches_its_rows_and_its_loss_is_per_token(place, tmp_path):
    """Equal rewards: nothing but the conversations teaches. The logged loss does not depend on how --loss weighs."""
    options = dict(reward="constant", replay=0.5, replay_data=str(place / "chats.jsonl"), max_steps=12, seed=1,
                   replay_loss="ce")
    for loss in ("dapo", "grpo"):
        train("grpo", place, tmp_path / loss, loss=loss, **options)
        logged = [entry["replay_loss"] for entry in steps_of(tmp_path / loss)]
        assert 1 < logged[0] < 20 and sum(logged[-3:]) < 0.8 * sum(logged[:3])
    dapo, grpo = (steps_of(tmp_path / loss)[0]["replay_loss"] for loss in ("dapo", "grpo"))
    assert dapo == pytest.approx(grpo, rel=1e-5)


# ------------------------------------------------------------------------------------------------- exactness


RESUMED = {
    "grpo": ("grpo", dict(resample=1, mask_truncated=True, beta=0.1)),
    "grpo, replay": ("grpo", dict(loss="grpo", replay=0.3, minibatches=2)),
    "grpo, lora": ("grpo", dict(lora_rank=2, beta=0.1, inner_epochs=2)),
    "grpo, bfloat16": ("grpo", dict(dtype="bfloat16")),
    "spo": ("spo", dict(inner_epochs=2)),
    "spo, bfloat16": ("spo", dict(dtype="bfloat16", beta=0.1)),
    "ppo": ("ppo", dict(kl_target=0.5, replay=0.2)),
    "ppo, bfloat16": ("ppo", dict(dtype="bfloat16")),
    "ppo, lora": ("ppo", dict(lora_rank=2)),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_killed_run_continues_to_the_same_bits(case, place, tmp_path):
    """Saved after step 4, in the middle of a log window; killed after step 5; what the method keeps is the same too."""
    name, changes = RESUMED[case]
    options = dict(max_steps=7, save_every=4, log_every=3, eval_every=2, replay_data=str(place / "chats.jsonl"),
                   **changes)
    train(name, place, tmp_path / "whole", **options)
    with killed_after(5):
        train(name, place, tmp_path / "cut", **options)
    train(name, place, tmp_path / "cut", **options)
    file = "adapter_model.safetensors" if "lora_rank" in changes else "model.safetensors"
    assert same(load_file(tmp_path / "whole" / file), load_file(tmp_path / "cut" / file))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    if name != "grpo":
        whole, cut = kept(tmp_path / "whole"), kept(tmp_path / "cut")
        assert whole.keys() == cut.keys() == {"spo": {"tracker"}, "ppo": {"critic", "beta"}}[name]
        assert all(same(whole[part], cut[part]) for part in whole)
    if name == "ppo":
        assert not torch.equal(whole["critic"]["score.weight"], torch.zeros(1, 32))
        assert (float(whole["beta"]["beta"]) != 0.02) == ("kl_target" in changes)


@pytest.mark.parametrize("name", SCRIPTS)
def test_micro_batches_change_nothing(name, place, tmp_path):
    """All rows at once, three at a time, and one by one (so without any padding)."""
    sizes = (0, 3, 1)
    for micro in sizes:
        train(name, place, tmp_path / f"m{micro}", micro_batch_size=micro, dtype="float64", replay=0.2, beta=0.05,
              replay_data=str(place / "chats.jsonl"), max_steps=3, eval_every=2)
    whole, *parts = [weights(tmp_path / f"m{micro}") for micro in sizes]
    for part in parts:
        assert all(torch.allclose(whole[k], part[k], rtol=0, atol=1e-7) for k in whole)
    whole, *parts = [list(map(numbers, metrics(tmp_path / f"m{micro}"))) for micro in sizes]
    for part in parts:
        assert all(one == pytest.approx(other, rel=1e-4, abs=1e-5) for one, other in zip(whole, part, strict=True))


# -------------------------------------------------------------------------------- sampling and scoring


@pytest.mark.parametrize("name", SCRIPTS)
def test_at_the_first_inner_step_every_ratio_is_one(name, place, tmp_path):
    train(name, place, tmp_path / "run", max_steps=3, minibatches=1, inner_epochs=1, temperature=0.7)
    for entry in steps_of(tmp_path / "run"):
        assert entry["clip_low"] == entry["clip_high"] == 0 and 0 <= entry["log_ratio"] <= entry["max_log_ratio"] < 1e-3


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_next_inner_steps_move_away_from_it(name, place, tmp_path):
    train(name, place, tmp_path / "run", max_steps=3, minibatches=2, inner_epochs=3, lr=0.1, **(
        dict(target_kl=0.0) if name == "ppo" else {}))
    assert any(entry["clip_low"] + entry["clip_high"] > 0 for entry in steps_of(tmp_path / "run"))
    assert all(entry["max_log_ratio"] < 1e-3 for entry in steps_of(tmp_path / "run"))


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("wrong", [dict(temperature=1.1), dict(attention_mask=None)])
def test_scoring_that_is_not_sampling_is_refused(name, wrong, place, tmp_path, monkeypatch):
    scored = SCRIPTS[name].token_logprobs

    def otherwise(model, ids, mask=None, *args, temperature=1.0):
        if "temperature" in wrong:
            return scored(model, ids, mask, *args, temperature=wrong["temperature"] * temperature)
        return scored(model, ids.roll(1, 0), mask, *args, temperature=temperature)     # other rows

    monkeypatch.setattr(SCRIPTS[name], "token_logprobs", otherwise)
    with pytest.raises(UserError, match="sampling and scoring disagree"):
        train(name, place, tmp_path / "run")


@pytest.mark.parametrize("name", SCRIPTS)
def test_rescore_takes_the_log_probabilities_of_the_trained_model(name, place, tmp_path, monkeypatch):
    """Where the copy that samples is not the policy, ratios are wrong; with --rescore they are 1 again."""
    sample = experience.sample

    def off(*args, **options):
        rollout = sample(*args, **options)
        rollout.old_logprobs = rollout.old_logprobs - 0.3 * rollout.completion_mask
        return rollout

    monkeypatch.setattr(experience.act, "__defaults__", (off,))
    with pytest.raises(UserError, match="--rescore"):
        train(name, place, tmp_path / "run")
    train(name, place, tmp_path / "rescored", rescore=True, temperature=0.8)
    assert all(entry["max_log_ratio"] < 1e-5 for entry in steps_of(tmp_path / "rescored"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_copy_in_sixteen_bits_samples_for_a_policy_in_thirty_two(name, place, tmp_path):
    """Its rounding shows in the ratios of the first step, which --rescore takes away."""
    options = dict(rollout_dtype="bfloat16", max_steps=2, minibatches=1, inner_epochs=1)
    train(name, place, tmp_path / "copy", **options)
    assert any(entry["max_log_ratio"] > 1e-5 for entry in steps_of(tmp_path / "copy"))
    train(name, place, tmp_path / "rescored", rescore=True, **options)
    assert all(entry["max_log_ratio"] < 1e-5 for entry in steps_of(tmp_path / "rescored"))


# ------------------------------------------------------------------------------------------------- canaries


def test_a_reward_that_can_be_had_for_nothing_ends_the_run(place, tmp_path, capsys):
    """The function likes the word "yes", which the policy never says; a rule that does so is left alone."""
    (tmp_path / "fooled.py").write_text("def likes(texts, items):\n    return [float(t == 'yes') for t in texts]\n")
    options = dict(reward=f"{tmp_path / 'fooled.py'}:likes", eval_every=1, max_steps=6)
    assert train("grpo", place, tmp_path / "guarded", canaries=3, **options)["steps"] == 3
    assert "an answer without merit" in capsys.readouterr().out
    assert train("grpo", place, tmp_path / "watched", canaries=0, **options)["steps"] == 6
    write_prompts(tmp_path / "yes.jsonl", answer="yes")
    options |= dict(reward="checker", data=str(tmp_path / "yes.jsonl"))
    assert train("grpo", place, tmp_path / "rule", canaries=1, **options)["steps"] == 6
    assert all(entry["val_canary_wins"] for entry in held_out(tmp_path / "rule"))


# -------------------------------------------------------------------------------- adapters and the reference


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_reference_of_an_adapter_is_the_model_below_it(name, place, tmp_path, monkeypatch):
    """No copy is made, the base keeps its bytes, and the folder is PEFT's."""
    made, reference = [], experience.Reference
    monkeypatch.setattr(experience, "Reference", lambda *args: made.append(reference(*args)) or made[-1])
    before = (place / "base" / "model.safetensors").read_bytes()
    train(name, place, tmp_path / "run", lora_rank=2, beta=0.05, lr=3e-2, max_steps=6, eval_every=3)
    assert made[0].shared
    assert (place / "base" / "model.safetensors").read_bytes() == before
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "model.safetensors" not in names
    first, *_, last = held_out(tmp_path / "run")
    assert first["val_kl"] == pytest.approx(0, abs=1e-9) and last["val_kl"] > 1e-4
    load_model(place / "base")[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_reference_is_kept_where_one_is_asked_and_nowhere_else(name, place, tmp_path, monkeypatch):
    made, reference = [], experience.Reference
    monkeypatch.setattr(experience, "Reference", lambda *args: made.append(reference(*args)) or made[-1])
    again = dict(replay=0.5, replay_data=str(place / "chats.jsonl"), max_steps=1)
    train(name, place, tmp_path / "free", beta=0.0, max_steps=1)
    train(name, place, tmp_path / "taught", beta=0.0, replay_loss="ce", **again)
    assert not made and "val_kl" not in held_out(tmp_path / "taught")[-1]
    train(name, place, tmp_path / "replay", beta=0.0, **again)
    assert len(made) == 1 and "val_kl" in held_out(tmp_path / "replay")[-1]
    train(name, place, tmp_path / "held", beta=0.05)
    frozen = made[1].model
    assert not any(p.requires_grad for p in frozen.parameters())
    assert same(frozen.state_dict(), weights(place / "base")) and not same(frozen.state_dict(),
                                                                           weights(tmp_path / "held"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_price_on_the_kl_holds_the_policy_back(name, place, tmp_path):
    far = []
    for beta in (0.001, 1.0):
        train(name, place, tmp_path / f"{beta}", **{**LONG[name], "beta": beta, "max_steps": 15, "lr": 5e-3})
        far.append(held_out(tmp_path / f"{beta}")[-1]["val_kl"])
    assert far[1] < 0.7 * far[0]


# ------------------------------------------------------------------------------------------------- GRPO


def stub_run(cfg, gather=lambda value: [value]):
    return SimpleNamespace(cfg=cfg, gather=gather)


@pytest.mark.parametrize("loss", train_grpo.VARIANTS)
def test_every_loss_is_its_formula(loss):
    """Value and gradient of a step by loops over completions and tokens, where ratios are not 1 and lengths differ."""
    cfg = train_grpo.Config(loss=loss, num_generations=2, batch_size=4, max_new_tokens=9, beta=0.1)
    train_grpo.fill_in(cfg)
    generator, model = torch.Generator().manual_seed(0), undecided().double()
    rows = [(torch.randint(5, 900, (3 + n,), generator=generator).tolist(), [0] * 3 + [1] * n, [0.0] * (3 + n))
            for n in (5, 2, 7, 3)]
    rollout = from_rows(rows, [{"row": 0}] * 4, [0, 0, 1, 1], [True] * 4, [""] * 4, 0, 0)
    mask, R = rollout.completion_mask, torch.tensor([1.0, 0.0, 0.25, 0.5])
    logits = model(rollout.input_ids, rollout.attention_mask).logits.log_softmax(-1)
    logprobs = F.pad(logits[:, :-1].gather(2, rollout.input_ids[:, 1:, None])[:, :, 0], (1, 0))
    old, ref = ((logprobs.detach() + spread * (2 * torch.rand(mask.shape, generator=generator) - 1)) * mask
                for spread in (2.0, 0.5))
    batch = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask, "completion_mask": mask,
             "old_logprobs": old, "ref_logprobs": ref,
             "advantages": train_grpo.credit(stub_run(cfg), R, rollout.groups)}
    total, parts, _ = train_grpo.compute_loss(model, None, batch, cfg, 0.0)
    low, high = {"gspo": (3e-4, 4e-4), "dapo": (0.2, 0.28), "cispo": (0, 5.0)}.get(loss, (0.2, 0.2))
    wanted = 0.0
    for i in range(4):
        group, tokens = R[i // 2 * 2:i // 2 * 2 + 2], mask[i].nonzero()[:, 0]
        A = {"dr_grpo": R[i] - group.mean(), "rloo": R[i] - group[1 - i % 2]}.get(
            loss, (R[i] - group.mean()) / (group.std() + 1e-4))
        ratios = (logprobs[i] - old[i])[tokens].exp()
        for t, ratio in zip(tokens, ratios, strict=True):
            w = {"grpo": 1 / len(tokens), "gspo": 1 / len(tokens), "dr_grpo": 1 / 9}.get(loss, 1)
            s = ratios.log().mean().exp() if loss == "gspo" else ratio
            value = -min(s * A, s.clamp(1 - low, 1 + high) * A)
            if loss == "cispo":
                value = -min(float(ratio.detach()), high) * A * logprobs[i, t]
            gap = ref[i, t] - logprobs[i, t]
            wanted = wanted + w * (value + 0.1 * ratio * (gap.exp() - 1 - gap))
    assert float(total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    ours, theirs = (torch.autograd.grad(x, model.lm_head.weight, retain_graph=True)[0] for x in (total, wanted))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-9)
    assert (parts["clip_high"] + parts["clip_low"] > 0) and parts["clip_high"] + parts["clip_low"] <= mask.sum()


def test_flat_groups_are_replaced_by_other_prompts(place, tmp_path, monkeypatch):
    """Rewards by hand: prompts 0 and 2 of four are flat in the first round, the substitute of 2 still in the second.
    What stands in the place of each prompt, and what counts, is followed through to the end."""
    data = PromptDataset(str(place / "prompts.jsonl"), NANO, 64)
    cfg = train_grpo.Config(seed=3, num_generations=2, batch_size=8, resample=2, max_new_tokens=4)
    run = SimpleNamespace(cfg=cfg, total_steps=5, rows_per_step=4)
    model = undecided()
    sampler = SimpleNamespace(policy=model, refresh=lambda: model)
    numbers = [8, 9, 10, 11]
    items = [{**data[row], "row": row} for row in (0, 1, 2, 3)]
    rollout = experience.act(run, sampler, NANO, items, numbers, 3)
    asked, act = [], experience.act
    monkeypatch.setattr(experience, "act", lambda *args: asked.append(args[4]) or act(*args))
    verdicts = iter([torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 1])])
    before = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 1])
    new, rewards_of = experience.replace_flat(run, sampler, NANO, data, rollout, before,
                                              lambda rows: (next(verdicts), {}), numbers, 3)
    assert asked == [[8 + 20, 10 + 20], [10 + 40]]
    assert new.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rewards_of.tolist() == [1, 0, 1, 0, 0, 1, 0, 1]
    rows = [item["row"] for item in new.items]
    assert rows[2:4] == [1, 1] and rows[6:] == [3, 3]
    stream = experience.row_stream(data, 3)
    assert rows[:2] == [stream(28)] * 2 and rows[4:6] == [stream(50)] * 2
    assert new.completion_mask.any(1).all()
    verdicts = iter([torch.tensor([1.0, 1, 0, 1]), torch.tensor([0.0, 0])])       # 0 stays flat
    new, rewards_of = experience.replace_flat(run, sampler, NANO, data, rollout, before,
                                              lambda rows: (next(verdicts), {}), numbers, 3)
    assert new.completion_mask.any(1).tolist() == [False, False] + [True] * 6
    assert rewards_of.tolist() == [0, 0, 1, 0, 0, 1, 0, 1]


def test_resampling_finds_what_there_is_to_learn(place, tmp_path):
    train("grpo", place, tmp_path / "plain", num_generations=2, max_steps=6)
    train("grpo", place, tmp_path / "again", num_generations=2, max_steps=6, resample=3)
    assert any(entry["grad_norm"] == 0 for entry in steps_of(tmp_path / "plain"))
    assert all(entry["grad_norm"] > 0 for entry in steps_of(tmp_path / "again"))
    assert any(entry["degenerate"] > 0 for entry in steps_of(tmp_path / "again"))        # of what was sampled first


@pytest.mark.parametrize("changes", [dict(resample=2, reward="constant"), dict(mask_truncated=True, max_new_tokens=1)])
@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_a_step_in_which_nothing_counts_changes_nothing(changes, loss, place, tmp_path):
    train("grpo", place, tmp_path / "run", loss=loss, max_steps=2, **changes)
    assert same(weights(place / "base"), weights(tmp_path / "run"))
    assert all(entry["grad_norm"] == 0 for entry in steps_of(tmp_path / "run"))


def test_mask_truncated_leaves_cut_completions_out(place, tmp_path, monkeypatch):
    """One token, then the end: with room for one token all are cut; here some are, by a limit of their own."""
    seen, updates = [], experience.updates
    monkeypatch.setattr(experience, "updates",
                        lambda run, rollout, *args: seen.append(rollout) or updates(run, rollout, *args))
    rows = (place / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    mixed = [json.dumps({**json.loads(row), "max_new_tokens": 1 + i % 2}) for i, row in enumerate(rows)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(mixed) + "\n", encoding="utf-8")
    for mask_truncated in (False, True):
        train("grpo", place, tmp_path / f"{mask_truncated}", data=str(tmp_path / "mixed.jsonl"), max_steps=2,
              mask_truncated=mask_truncated, num_generations=2)
    assert all(rollout.completion_mask.any(1).all() for rollout in seen[:2])
    for rollout in seen[2:]:
        assert rollout.completion_mask.any(1).tolist() == rollout.finished.tolist()
        assert 0 < rollout.finished.sum() < len(rollout)


# ------------------------------------------------------------------------------------------------- bad input


BAD = {
    "batch, groups": ("grpo", dict(batch_size=10), "--batch_size 10: must be a multiple of --num_generations 4"),
    "batch, minibatches": ("ppo", dict(batch_size=9), "--batch_size 9: must be a multiple"),
    "a group of one": ("grpo", dict(num_generations=1), "--num_generations 1: must be at least 2"),
    "no completions": ("spo", dict(num_generations=0), "--num_generations 0: must be at least 1"),
    "temperature": ("grpo", dict(temperature=0.0), "--temperature 0"),
    "no minibatch": ("ppo", dict(minibatches=0), "--minibatches 0: must be at least 1"),
    "no epoch": ("spo", dict(inner_epochs=0), "--inner_epochs 0"),
    "no tokens": ("ppo", dict(max_new_tokens=0), "--max_new_tokens 0"),
    "beta": ("grpo", dict(beta=-1.0), "--beta -1"),
    "spo's beta": ("spo", dict(beta=-1.0), "--beta -1"),
    "ppo's beta": ("ppo", dict(beta=float("nan")), "--beta nan"),
    "clip": ("grpo", dict(clip_low=-0.1), "--clip_low -0.1"),
    "gamma": ("ppo", dict(gamma=1.5), "--gamma 1.5"),
    "lam": ("ppo", dict(lam=-0.5), "--lam -0.5"),
    "critic_lr": ("ppo", dict(critic_lr=0.0), "--critic_lr 0"),
    "replay": ("grpo", dict(replay=-0.1), "--replay -0.1"),
    "replay_rows": ("grpo", dict(replay_rows=0), "--replay_rows 0"),
    "resample": ("grpo", dict(resample=-1), "--resample -1"),
    "offline": ("spo", dict(offline=0), "--offline 0"),
    "pool": ("spo", dict(pool=4), "--batch_size 8: .*--pool 4"),
    "kl_target alone": ("ppo", dict(kl_target=1.0, beta=0.0), "--kl_target 1.0: adapts --beta"),
    "float16": ("ppo", dict(dtype="float16"), "--dtype float16"),
    "no checker": ("grpo", dict(data="open.jsonl"), 'open.jsonl:.*no "checker"'),
    "no prompts": ("spo", dict(data="texts.jsonl"), "texts.jsonl:1"),
    "no such reward": ("grpo", dict(reward="good"), "--reward good"),
    "the gate": ("grpo", dict(min_pass=0.9, gate_prompts=4), "below --min_pass 0.9: .*--min_pass 0 to go on"),
    "no critic": ("ppo", dict(critic="nowhere"), "nowhere"),
    "quantized": ("grpo", dict(quantize="nf4"), "--lora_rank"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(case, place, tmp_path):
    name, changes, told = BAD[case]
    if case == "no prompts":
        (place / "texts.jsonl").write_text('{"text": "not a prompt"}\n', encoding="utf-8")
    if "data" in changes:
        changes = {"data": str(place / changes["data"])}
    with pytest.raises(UserError, match=told) as error:
        train(name, place, tmp_path / "run", **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_spo_refuses_rewards_that_are_no_share_of_a_success(place, tmp_path):
    (tmp_path / "mine.py").write_text("def marks(texts, items):\n    return [2.5] * len(texts)\n")
    with pytest.raises(UserError, match=r"reward 2.5 is outside \[0, 1\]") as error:
        train("spo", place, tmp_path / "run", reward=f"{tmp_path / 'mine.py'}:marks")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize("name", SCRIPTS)
def test_dry_run_shows_the_plan_the_gate_and_answers_and_leaves_nothing(name, place, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(name, place, tmp_path / "run", dry_run=True, lora_rank=2)
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and not (tmp_path / "run").exists()
    for line in ("  plan    4 steps of", "pass@1", "  memory  ", "  time    about"):
        assert line in shown
    *_, question, first, second, third = shown.rstrip().splitlines()
    assert question.startswith("    | what now") and all(line.startswith("    | +") for line in (first, second, third))


def test_a_wall_clock_budget_fixes_the_steps(place, tmp_path, monkeypatch):
    act = experience.act

    def slow(*args, **options):
        time.sleep(0.03)
        return act(*args, **options)

    monkeypatch.setattr(experience, "act", slow)
    monkeypatch.setattr(runtime, "STARTED", time.perf_counter())
    summary = train("grpo", place, tmp_path / "run", max_steps=5000, max_minutes=0.04, schedule="cosine", pass_k=1)
    assert 8 <= summary["steps"] == summary["planned_steps"] < 70
    assert steps_of(tmp_path / "run")[-1]["lr"] == pytest.approx(TINY["lr"] / 10)


@pytest.mark.parametrize("name", SCRIPTS)
def test_early_stop_keeps_the_weights_that_were_best_on_held_out_prompts(name, place, tmp_path):
    """The reward likes y, the checker n, which the start policy says: its rewards rise, and every step is worse."""
    data = write_prompts(tmp_path / "no.jsonl", answer="n")
    (tmp_path / "mine.py").write_text("def liked(texts, items):\n    return [float('y' in text) for text in texts]\n")
    train(name, place, tmp_path / "run", data=str(data), reward=f"{tmp_path / 'mine.py'}:liked", max_steps=40,
          early_stop=2, eval_every=3, batch_size=16)
    assert same(weights(place / "base"), weights(tmp_path / "run"))
    entries = held_out(tmp_path / "run")
    assert entries[0]["val_accuracy"] == entries[-1]["val_accuracy"] == 1 and entries[-1]["step"] < 40


# ------------------------------------------------------------------------------------------------- what is measured


CPU = torch.device("cpu")
EXAM = SimpleNamespace(pass_k=2, max_new_tokens=4, temperature=1.0, micro_batch_size=3)


def judged_samples(said):
    """A sampler whose n-th completion of a prompt is said[row][n], one character a token; cut without a full stop."""
    def sample(model, tokenizer, items, num_samples, *_, **__):
        texts = [said[item["row"]][n] for item in items for n in range(num_samples)]
        owners = [item for item in items for _ in range(num_samples)]
        rows = [(item["prompt_ids"] + tokenizer.encode(text), [0] * len(item["prompt_ids"]) + [1] * len(
            tokenizer.encode(text)), [0.0] * (len(item["prompt_ids"]) + len(tokenizer.encode(text))))
            for item, text in zip(owners, texts, strict=True)]
        return from_rows(rows, owners, [n for n in range(len(items)) for _ in range(num_samples)],
                         [text.endswith(".") for text in texts], [text.removesuffix(".") for text in texts], 0, 0)
    return sample


@pytest.fixture
def exam(tmp_path):
    """Four prompts of two skills (add: 2 of them), and two completions of each."""
    rows = [{"conversations": [{"role": "user", "content": f"{i} + 1 ?"}], "answer": str(i + 1), "checker": "number",
             "skill": "add" if i < 2 else f"more {i % 2}"} for i in range(4)]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = PromptDataset(str(tmp_path / "exam.jsonl"), NANO, 64)
    return data, [["1.", "0."], ["7", "7."], ["3.", "3."], ["9", "4."]]


def test_held_out_figures_of_a_policy_made_by_hand(exam):
    """Greedy: right, wrong (add), right (more 0), wrong (more 1)."""
    data, said = exam
    model, other = undecided(), undecided()
    with torch.no_grad():
        other.lm_head.weight[NO, 0] += 0.5
    judge = rewards.build("checker", NANO, max_new_tokens=4)
    answers = ["1", "0", "3", "3"]
    sample = judged_samples(said)
    figures = dashboard.measure(model, data, NANO, CPU, stub_run(EXAM), judge, lambda: nullcontext(other),
                                sample=sample, answer=lambda *args: [(answers[item["row"]], 1) for item in args[2]])
    assert figures["accuracy"] == pytest.approx((0.5 + 1 + 0) / 3) and figures["loss"] == 1 - figures["accuracy"]
    assert (figures["accuracy_add"], figures["accuracy_more 0"], figures["accuracy_more 1"]) == (0.5, 1, 0)
    assert figures["pass_1"] == figures["reward"] == 4 / 8 and figures["pass_2"] == 3 / 4
    assert figures["truncated"] == 2 / 8 and figures["length"] == 14 / 8
    low, high = figures["accuracy_interval"]
    assert low <= figures["accuracy"] <= high and figures["reward_interval"][0] < 0.5 < figures["reward_interval"][1]
    first = sample(model, NANO, [{**data[row], "row": row} for row in range(4)], 2).select([0, 2, 4, 6])
    entropy, kl = [], []
    with torch.no_grad():
        for ids, mask, sampled in zip(first.input_ids, first.attention_mask, first.completion_mask, strict=True):
            p, q = (m(ids[None, :int(mask.sum())]).logits[0].double().log_softmax(-1) for m in (model, other))
            for t in sampled.nonzero()[:, 0].tolist():
                entropy.append(-(p[t - 1].exp() * p[t - 1]).sum())
                kl.append((p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum())
    assert figures["entropy"] == pytest.approx(float(sum(entropy) / len(entropy)), rel=1e-4)
    assert figures["kl"] == pytest.approx(float(sum(kl) / len(kl)), rel=1e-4) and figures["kl"] > 0.01
    assert figures["canary_wins"] == 0 and figures["canary_empty"] == figures["canary_yes"] == 0


def test_a_canary_that_earns_more_than_the_policy_is_told(exam, tmp_path):
    data, said = exam
    (tmp_path / "hacked.py").write_text("def likes(texts, items):\n    return [t.count('yes') * 3.0 for t in texts]\n")
    judge = rewards.build(f"{tmp_path / 'hacked.py'}:likes", NANO)
    figures = dashboard.measure(undecided(), data, NANO, CPU, stub_run(EXAM), judge, sample=judged_samples(said),
                                answer=lambda *args: [("1", 1)] * len(args[2]))
    assert figures["canary_yes"] == 3 and figures["canary_wins"] == 1 and figures["reward"] == 0
    assert figures["accuracy"] == 0.5 / 3                                # what was meant does not look at the reward


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_measure_what_one_does(exam, tmp_path, world_size):
    """Also where there are more ranks than prompts."""
    data, _ = exam
    (tmp_path / "mine.py").write_text("def size(texts, items):\n    return [len(t) + len(i['messages'][0]['content']) "
                                      "* 0.1 * int(i['answer']) for t, i in zip(texts, items)]\n")
    judge, model = rewards.build(f"{tmp_path / 'mine.py'}:size", NANO), undecided().double()
    about = dict(judge=judge, reference=experience.Reference(undecided(qk_norm=False).double()))
    whole = dashboard.measure(model, data, NANO, CPU, stub_run(EXAM), **about)
    parts = []

    class Told(Exception):
        pass

    def gather(value):
        parts.append(value)
        if len(parts) < world_size:
            raise Told
        return parts

    for rank in range(world_size):
        with nullcontext() if rank == world_size - 1 else pytest.raises(Told):
            shared = dashboard.measure(model, data, NANO, CPU, stub_run(EXAM, gather), rank=rank, world_size=world_size,
                                       **about)
    assert shared.keys() == whole.keys()
    for name, value in whole.items():
        assert shared[name] == pytest.approx(value, rel=1e-6), name


def test_the_interval_of_the_reward_knows_that_samples_of_a_prompt_are_alike():
    part = {"rewards": [1.0, 1.0, 0.0, 0.0], "lengths": [1] * 4, "finished": [True] * 4, "entropy": [0.0], "kl": [0.0],
            **{f"canary_{name}": [0.0] for name in rewards.CANARIES}}
    low, high = dashboard.summed_up([part], samples=2, with_kl=False)["reward_interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / 2 ** 0.5)                          # two prompts, not four
