"""Speech and sound: AISHELL-1, AISHELL-2, speechocean762, ESC-10 and ESC-50."""

from __future__ import annotations

from pathlib import Path

from x2l.data.builders.entry import Bad, Entries, Entry, checked, grouped, need, read_csv, read_pairs


def aishell1(root: Path, split: str) -> Entries:
    """AISHELL-1: ``transcript/aishell_transcript_v0.8.txt`` and ``wav/<split>/<speaker>/<id>.wav`` (train, dev, test)."""
    texts, bad = grouped(read_pairs(root / "transcript" / "aishell_transcript_v0.8.txt"))
    yield from bad
    for path in sorted(need(root / "wav" / split).glob("*/*.wav")):
        if problem := _problem(texts.get(path.stem)):
            yield Bad(path.stem, problem)
            continue
        fields = {"text": texts[path.stem][0].replace(" ", ""), "lang": "zh", "spk": path.parent.name}
        yield Entry(path.stem, fields | {"source": "aishell-1", "licence": "Apache-2.0"}, {"wav": path})


def aishell2(root: Path, split: str) -> Entries:
    """AISHELL-2: ``<split>/wav.scp`` and ``<split>/trans.txt``, as in ``iOS/data``; files are named by speaker and number."""
    folder = root / split
    texts, bad = grouped(read_pairs(folder / "trans.txt"))
    yield from bad
    for pair in read_pairs(folder / "wav.scp"):
        if isinstance(pair, Bad):
            yield pair
        elif problem := _problem(texts.get(pair[0])):
            yield Bad(pair[0], problem)
        else:
            key, path = pair[0], folder / pair[1]
            fields = {"text": texts[key][0].replace(" ", ""), "lang": "zh", "spk": path.parent.name}
            yield Entry(key, fields | {"source": "aishell-2", "licence": "AISHELL-2 agreement, research only"}, {"wav": path})


def speechocean762(root: Path, split: str) -> Entries:
    """speechocean762: Kaldi tables ``<split>/{wav.scp,text,utt2spk,spk2age}`` (train, test); paths start at the root."""
    texts, bad = grouped(read_pairs(root / split / "text"))
    yield from bad
    speakers = grouped(read_pairs(root / split / "utt2spk"))[0]
    ages = grouped(read_pairs(root / split / "spk2age"))[0]
    for pair in read_pairs(root / split / "wav.scp"):
        if isinstance(pair, Bad):
            yield pair
        elif problem := _problem(texts.get(pair[0])) or ("" if pair[0] in speakers else "no speaker"):
            yield Bad(pair[0], problem)
        else:
            speaker = speakers[pair[0]][0]
            age = ages.get(speaker, [""])[0]
            fields = {"text": texts[pair[0]][0], "lang": "en", "spk": speaker, "age": int(age) if age.isdecimal() else -1}
            yield Entry(pair[0], fields | {"source": "speechocean762", "licence": "free to use"}, {"wav": root / pair[1]})


def _problem(texts: list[str] | None) -> str:
    """Why these transcripts of one recording cannot be used; "" when they can."""
    if not texts:
        return "no transcript"
    return "" if len(set(texts)) == 1 else f"{len(texts)} transcripts that differ"


CHINESE = {
    "dog": "狗叫", "rooster": "公鸡打鸣", "rain": "下雨", "sea_waves": "海浪", "crackling_fire": "火焰噼啪声",
    "crying_baby": "婴儿哭", "sneezing": "打喷嚏", "clock_tick": "钟表滴答声", "helicopter": "直升机", "chainsaw": "电锯",
}  # fmt: skip


def esc50(root: Path, split: str) -> Entries:
    """ESC-50: ``meta/esc50.csv`` and ``audio``; the official folds 1-5 are the splits, "1234" joins four of them."""
    return _esc(root, split, only_ten=False)


def esc10(root: Path, split: str) -> Entries:
    """ESC-10, the part of ESC-50 under CC-BY, with Chinese class names."""
    return _esc(root, split, only_ten=True)


def _esc(root: Path, split: str, only_ten: bool) -> Entries:
    for row in read_csv(root / "meta" / "esc50.csv"):
        name, label, fold = row.get("filename"), row.get("category"), row.get("fold")
        if not (checked(name) and checked(label) and fold in set("12345")) or not name or not label or not fold:
            yield Bad(str(name), f"expected a file name, a fold 1-5 and a category, got {row}")
            continue
        if fold not in split or (only_ten and row.get("esc10") != "True"):
            continue
        licence = "CC-BY-3.0" if row.get("esc10") == "True" else "CC-BY-NC-3.0"
        fields = {"en": label.replace("_", " "), "fold": int(fold), "source": "esc", "licence": licence}
        fields |= {"zh": CHINESE[label]} if label in CHINESE else {}
        yield Entry(Path(name).stem, fields, {"wav": root / "audio" / name})
