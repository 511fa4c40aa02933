"""Models in other programs' forms."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml
from safetensors.torch import save

from x2l.build import split_importer
from x2l.config import load_model_config
from x2l.llm import llm_folder, read_table
from x2l.weights import HUB_FILES, resolve

README = """\
# {name} behind vLLM

`llm/` is for the machines that run vLLM, the rest for those that run `x2l serve`. From this folder:

    vllm serve llm --enable-prompt-embeds --dtype {dtype} --port 8001
    x2l serve --model model.yaml --vllm http://127.0.0.1:8001/v1 --max-batch 64

vLLM believes whatever embeddings it is sent: let nobody but `x2l serve` reach its port, or give both the same key (`vllm serve
--api-key KEY`, `X2L_VLLM_KEY=KEY x2l serve ...`). Clients talk to `x2l serve` alone.

| | |
|---|---|
| `llm/` | the LLM: Hugging Face folder, safetensors |
| `model.yaml` | the recipe; its paths start at this folder |
| `table/` | the LLM's tokenizer and token table |
| `interfaces/` | our trained interfaces |

Encoders are fetched on first use, as the recipe names them.
"""


def export_vllm(model: str, overrides: Sequence[str], out: Path) -> str:
    """Write a model recipe's LLM for vLLM, and beside it what `x2l serve --vllm` needs.

    Returns:
        What to do next.

    Raises:
        ValueError: ``out`` is not empty, or the LLM is none that `read_table` takes.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not an empty folder: name another")
    config = load_model_config(model, overrides)
    folder = llm_folder(config.llm.spec, config.llm.sha256)
    _, key, table = read_table(folder)
    for name in ("llm", "table", "interfaces"):
        (out / name).mkdir(parents=True)
    for path in [path for pattern in HUB_FILES for path in folder.glob(pattern)]:
        shutil.copyfile(path, out / "llm" / path.name)
        if ".safetensors" not in path.name:
            shutil.copyfile(path, out / "table" / path.name)
    # Not model.safetensors: transformers would load that name alone, and draw the layers at random.
    (out / "table" / "table.safetensors").write_bytes(save({key: table}))
    modalities = {}
    for name, part in config.modalities.items():
        if part.weights:
            importer, spec = split_importer(part.weights)
            shutil.copyfile(resolve(spec), out / "interfaces" / f"{name}.safetensors")
            part = part.model_copy(update={"weights": f"{importer}interfaces/{name}.safetensors"})
        modalities[name] = part
    llm = config.llm.model_copy(update={"spec": "table", "sha256": None})
    recipe = config.model_copy(update={"llm": llm, "modalities": modalities})
    (out / "model.yaml").write_text(yaml.safe_dump(recipe.model_dump(exclude_defaults=True), sort_keys=False, allow_unicode=True))
    (out / "README.md").write_text(README.format(name=Path(model).stem, dtype=config.llm.dtype))
    return f"{out}/README.md has the two commands"
