"""Three pages to look at models with: chat with them, see what happens inside, watch them train.

reads   checkpoint and adapter folders under out/ and checkpoints/, model/nano, any folder named in the sidebar;
        metrics.jsonl and summary.json of runs under out/
writes  ratings, if you give some: ratings.jsonl and comparisons.jsonl in the folder of runs
run     streamlit run scripts/web_demo.py
        streamlit run scripts/web_demo.py -- --model out/dpo --quantize int8
        streamlit run scripts/web_demo.py -- --url http://127.0.0.1:8998/v1        answers from a server

Chat streams answers, folds thoughts, runs the tools a model calls, and sets two models side by side. Inspect shows
what a model expects after each token and how it comes to it. Training draws the curves of runs while they grow. The
model runs in this process, or answers come from any OpenAI-compatible server. Nothing is loaded from elsewhere, and
nothing that a model writes is obeyed: it is shown as plain text. scripts/.streamlit/config.toml says how it is served:
to this machine only.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])         # the project root, not scripts/

from dataclasses import dataclass

from model.cli import arg, parse_args


@dataclass
class Config:
    model: str = arg("out/full_sft", "checkpoint folder chosen at first; where it is not there: model/nano")
    adapter: str = arg("", "adapter folder chosen at first, as out/lora")
    url: str = arg("", "address of an OpenAI-compatible server, with /v1; empty = the model runs in this process")
    runs: str = arg("out", "folder with checkpoints, adapters and runs")
    rope_scaling: str = arg("", "yarn:4 or linear:4: read a context 4 times as long as trained")
    quantize: str = arg("none", "keep the weights of the blocks in 8 or 4 bits: less memory, slower on a CPU",
                        choices=("none", "int8", "int4", "nf4"))
    device: str = arg("auto", "where to compute: auto, cpu, cuda or mps")
    dtype: str = arg("auto", "number format: float32, bfloat16, or auto (bfloat16 where the hardware is fast at it)")


def main(cfg):
    import streamlit as st

    from scripts.web import chat, inside, training
    from scripts.web.labels import LANGUAGES, say

    st.set_page_config(page_title="Acorn", page_icon="🌰",
                       layout="wide" if st.session_state.get("compare") else "centered")
    st.session_state.setdefault("language", LANGUAGES[0])
    pages = [("chat", chat, ":material/chat:"), ("inspect", inside, ":material/troubleshoot:"),
             ("training", training, ":material/monitoring:")]
    page = st.navigation([st.Page(lambda module=module: module.page(cfg), title=say(name), icon=icon, url_path=name,
                                  default=name == "chat") for name, module, icon in pages])
    st.sidebar.segmented_control("Language / 语言", LANGUAGES, key="language", required=True, persist_state="session",
                                 label_visibility="collapsed")
    page.run()


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__)
    from streamlit.runtime.scriptrunner import get_script_run_ctx
    if get_script_run_ctx(suppress_warning=True) is None:
        sys.exit("error: start it with: streamlit run scripts/web_demo.py")
    main(CONFIG)
