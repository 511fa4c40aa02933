"""The commands of LLaVA-Bench-COCO; ``eval/commands.py`` adds them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def llava_answers(
    folder: Annotated[Path, typer.Argument(help="folder with LLaVA's published files")],
    images: Annotated[Path, typer.Argument(help="folder with the COCO val2014 photos")],
    translations: Annotated[Optional[Path], typer.Option(help="JSON of question_id and text_zh: ask in Chinese")] = None,  # noqa: UP045
    model: Annotated[str, typer.Option("--model", "-m", help="model recipe: a shipped name, or a path")] = "tiny",
    out: Annotated[Path, typer.Option(help="run folder")] = Path("runs/llava-answers"),
    max_new_tokens: int = 512,
    batch_size: int = 8,
) -> None:
    """Answer LLaVA-Bench-COCO; hand the run folder to ``llava-bench`` for judgement."""
    from x2l.assistant import Assistant
    from x2l.eval import llava_bench, predict, questions

    assistant = Assistant.load(model)
    chinese = llava_bench.load_answers(translations, "text_zh") if translations else None
    asked = questions.llava_bench(llava_bench.load_questions(folder), images, chinese)
    typer.echo(
        predict.predict(
            assistant, asked, out, task="open", dataset="LLaVA-Bench-COCO", model_info=assistant.info(),
            decode={"max_new_tokens": max_new_tokens}, batch_size=batch_size, render=assistant.render,
        )
    )  # fmt: skip


def llava_bench(
    folder: Annotated[Path, typer.Argument(help="folder with LLaVA's published files (questions, contexts, rules)")],
    answers: Annotated[Path, typer.Argument(help="run folder, or JSON or JSONL of question_id and text")],
    mode: Annotated[str, typer.Option(help="robust, or paper: the original protocol with its defects")] = "robust",
    out: Annotated[Path, typer.Option(help="judgements; an interrupted run goes on from here")] = Path("runs/llava-bench"),
    translate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="put Chinese answers into English first: judge (its own model), opus, or a CTranslate2 folder"),
    ] = None,
    local: Annotated[Optional[str], typer.Option(help="model recipe that judges, in place of an endpoint")] = None,  # noqa: UP045
    workers: int = 4,
) -> None:
    """Judge answers to LLaVA-Bench-COCO; the judge is named by X2L_JUDGE_URL, X2L_JUDGE_MODEL and X2L_JUDGE_KEY.

    Exits with 3 where fewer than 98 % of the judgements could be read.
    """
    from x2l.assistant import Assistant
    from x2l.eval import judge, tasks
    from x2l.eval import llava_bench as bench

    chat: judge.Chat = judge.LocalChat(Assistant.load(local), local) if local else judge.Endpoint.from_env()
    references = bench.load_answers(folder / "qa90_gpt4_answer.jsonl")
    translator = judge.find_translator(translate, chat) if translate else None
    judge.judge(bench.load_questions(folder), references, bench.load_answers(answers), chat, out, mode, translator, workers)
    summary = judge.score(out)
    typer.echo(bench.format_summary(summary))
    raise typer.Exit(tasks.exit_code(summary, bench.MIN_COVERAGE))


def replay(
    reviews: Annotated[list[str], typer.Argument(help="name=path of published review files")],
    order: Annotated[str, typer.Option(help="candidate-first (X-LLM) or reference-first (LLaVA)")] = "candidate-first",
) -> None:
    """What published judgements say under one rule for those that could not be read.

    Example:

        x2l eval replay X-LLM=../shared/data/llava_bench_coco/xllm/review.json
    """
    from x2l.eval.llava_bench import one_rule_report

    pairs = [item.partition("=") for item in reviews]
    wrong = [name for name, equals, path in pairs if not (name and equals and path)]
    if wrong:
        raise ValueError(f"expected name=path, got {wrong[0]!r}")
    typer.echo(one_rule_report({name: path for name, _, path in pairs}, order))
