"""One answer at a time: our server's tokens a second beside llama.cpp on the same Q4_1 file and OpenVINO with int8 weights.

    python benchmarks/decode_peers.py PEERS_PYTHON [tokens]

``PEERS_PYTHON`` is the python of an environment with ``llama-cpp-python`` and ``optimum-intel[openvino]`` (either may be missing).
The tiny model's LLM, greedy, one prompt, answers of full length; ours in float32, bfloat16, 8 and 4 bits (`--weight-bits`); each in
a process of its own, one thread, CPU seconds, interleaved, the best of the rounds. Seconds beyond those of an answer of one token
count, so that it matters little that ours comes by HTTP and from a chat template, the peers' from the bare text.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = "Tell me about the sea."
ROUNDS = 4
SAYS = "decode_peers: "
GOALS = {"llama.cpp Q4_1": 1.0, "OpenVINO int8": 0.9}  # of ours with as many bits
WEIGHTS = {"float32": ("float32", 16), "bfloat16": ("bfloat16", 16), "8 bits": ("bfloat16", 8), "4 bits": ("bfloat16", 4)}


def llama(path: str) -> Callable[[int], Any]:
    import llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def plain() -> Any:
        params = defaults()
        params.use_extra_bufts = False  # its layout for AMX crashes on Q4_1
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain
    model = llama_cpp.Llama(path, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    ids = model.tokenize(PROMPT.encode())

    def ask(tokens: int) -> None:
        model.reset()
        for _, token in zip(range(tokens), model.generate(ids, temp=0.0), strict=False):
            assert token >= 0

    return ask


def openvino(folder: str) -> Callable[[int], Any]:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    model = OVModelForCausalLM.from_pretrained(
        folder,
        export=True,
        quantization_config=OVWeightQuantizationConfig(bits=8),
        ov_config={"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1},
    )
    inputs = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    return lambda tokens: model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)


def ours(weights: str) -> Callable[[int], Any]:
    from serve import Bench

    dtype, bits = WEIGHTS[weights]
    bench = Bench("tiny", 1, [f"llm.dtype={dtype}"], bits)
    return lambda tokens: bench.ask(PROMPT, tokens=tokens)


def child(kind: str, argument: str) -> None:
    """Answer as often as standard input says with how many tokens, and print the CPU seconds of each."""
    try:
        import torch

        torch.set_num_threads(1)
    except ImportError:
        pass
    try:
        ask = {"llama": llama, "openvino": openvino, "ours": ours}[kind](argument)
    except ImportError as error:
        print(SAYS + json.dumps(str(error)), flush=True)
        return
    ask(4)
    print(SAYS + json.dumps("ready"), flush=True)
    for line in sys.stdin:
        start = time.process_time()
        ask(int(line))
        print(SAYS + json.dumps(time.process_time() - start), flush=True)


class Side:
    """One of those that are compared, in a process of its own."""

    def __init__(self, python: str, kind: str, argument: str):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- as long as the process
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen([python, __file__, "--child", kind, argument], text=True, **pipes)
        self.state = self._read()
        self.seconds: dict[int, float] = {}

    def _read(self) -> Any:
        """What the child says next; libraries print, too."""
        for line in self.process.stdout or ():
            if line.startswith(SAYS):
                return json.loads(line.removeprefix(SAYS))
        self.errors.seek(0)
        return f"it ended: {self.errors.read()[-300:]}"

    def ask(self, tokens: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{tokens}\n")
        self.process.stdin.flush()
        self.seconds[tokens] = min(self.seconds.get(tokens, 1e9), float(self._read()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main(python: str, tokens: int = 64) -> None:
    from x2l.config import load_model_config
    from x2l.export import export_vllm
    from x2l.weights import resolve

    spec = load_model_config("tiny").llm
    with tempfile.TemporaryDirectory() as folder:
        export_vllm("tiny", [], Path(folder) / "out")
        sides = {
            **{f"ours, {weights}": Side(sys.executable, "ours", weights) for weights in WEIGHTS},
            "llama.cpp Q4_1": Side(python, "llama", str(resolve(spec.spec, spec.sha256))),
            "OpenVINO int8": Side(python, "openvino", str(Path(folder) / "out" / "llm")),
        }
        ready = {name: side for name, side in sides.items() if side.state == "ready"}
        for _ in range(ROUNDS):
            for side in ready.values():
                side.ask(1)
                side.ask(tokens)
        for side in ready.values():
            side.close()
    rates = {name: (tokens - 1) / (side.seconds[tokens] - side.seconds[1]) for name, side in ready.items()}
    for name, side in sides.items():
        if name not in rates:
            print(f"{name}: not measured: {side.state}")
            continue
        print(f"{name}: {rates[name]:.1f} tok/s", end="")
        if name in GOALS:
            print(*(f", {rates[own] / rates[name]:.2f} by {own}" for own in rates if own.startswith("ours")), sep="", end="")
            print(f"; goal {GOALS[name]}", end="")
        print(flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(*sys.argv[2:])
    else:
        main(sys.argv[1], *map(int, sys.argv[2:3]))
