"""What a stage trains: a model that maps a batch to an `Output`, and the way from samples to such a batch."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from x2l import words
from x2l.align import Aligner
from x2l.asr import CIFASR, Decoder, Spoken, import_moonshine
from x2l.blip2 import NUM_SPECIAL, Blip2
from x2l.build import Built, build, initialise
from x2l.checkpoint import frozen_digest
from x2l.config import TrainConfig
from x2l.data.cache import FeatureCache
from x2l.data.collate import Collator, Fetch, raw, stack
from x2l.data.feed import open_feed
from x2l.devices import bf16_in_hardware
from x2l.encoders import moonshine
from x2l.interfaces.qformer import QFormer
from x2l.match import Matcher
from x2l.modalities.speech import Listener
from x2l.modality import Modality
from x2l.model import XLLM
from x2l.self_critical import Judged, Reward, SelfCritical, Writer
from x2l.types import Media, Sample
from x2l.vocabulary import Vocabulary
from x2l.weights import cache_dir

Families = list[list[Sample]]  # the samples of each record of a batch


@dataclass
class Stage:
    """A model, ``collate(families, step) -> batch`` (step None: no augmentation), and what is handed on in the end."""

    model: nn.Module
    collate: Callable[[Families, int | None], Any]
    export: Callable[[], dict[str, dict[str, Tensor]]]  # file stem -> tensors


def xllm_stage(cfg: TrainConfig) -> Stage:
    """Stages 2 and 3: interfaces in front of the frozen LLM; what the frozen modules before the first trained one give is
    cached, so that stage 3 never runs a Q-Former or C-Former twice on an item."""
    built, collator, fetch = aligned(cfg)

    def collate(families: Families, step: int | None) -> Any:
        return collator.train([sample for family in families for sample in family], fetch(step))

    return Stage(built.model, collate, partial(trained_interfaces, built.model))


def self_critical_stage(cfg: TrainConfig) -> Stage:
    """Stage 2 by the scores of one's own captions (self_critical.py); ``stage_args``: arguments of `Writer`.

    Validation is the loss of the human captions.
    """
    built, collator, fetch = aligned(cfg)
    feed = open_feed(cfg.data, cfg.data_root, cfg.batch_size, cfg.seed)
    captions = (
        [sample.messages[-1].text for sample in family if sample.meta.get("task") == "caption"]
        for step in range(len(feed))
        for family in feed.batch(step)
    )
    model = SelfCritical(built.model)
    write = Writer(model, collator, Reward(filter(None, captions)), **cfg.stage_args)

    def collate(families: Families, step: int | None) -> Judged:
        if step is None:
            return Judged(collator.train([sample for family in families for sample in family], fetch(None)))
        return write(families, fetch(step))

    return Stage(model, collate, partial(trained_interfaces, model))


def aligned(cfg: TrainConfig) -> tuple[Built, Collator, Callable[[int | None], dict[str, Fetch]]]:
    """A model for stages 2 and 3 as it starts, its collator, and the sources of cached features at a step."""
    # On a CPU plain matmuls beat the fused kernel at these short lengths, 2.0 s against 2.5 s a step (dev/LOG.md).
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    built = build(cfg.model, cfg.fresh, compute_dtype(cfg), attention)
    for prefix, source in cfg.init.items():
        initialise(built.model.get_submodule(prefix), source)
    for name, modality in built.model.modalities.items():
        assert isinstance(modality, Modality)
        modality.freeze(frozen_layers(f"modalities.{name}.interface", modality.interface, cfg.trainable))
    collator = Collator(built.renderer, built.processors, built.decoders, built.decode)
    caches = {name: feature_cache(cfg, name, built.model.modalities[name], collator) for name in cfg.model.modalities}
    return built, collator, lambda step: {name: viewed(cache, cfg, step) for name, cache in caches.items()}


def trained_interfaces(model: XLLM) -> dict[str, dict[str, Tensor]]:
    """The weights of each interface of which something is being trained."""
    return {
        name: modality.get_submodule("interface").state_dict()
        for name, modality in model.modalities.items()
        if is_trained(modality)
    }


def asr_stage(cfg: TrainConfig) -> Stage:
    """Stage 1 of speech: listener and decoder, and the encoder where ``trainable`` names it, else its cached features.

    ``stage_args``: ``vocabulary``, a pattern of the LLM's tokens to write in; ``decoder``, arguments of `Decoder`;
    ``moonshine``, true to start from Moonshine's decoder and to guide CIF by where it looks; and the other arguments of
    `CIFASR`.
    """
    model, vocabulary, built = asr_model(cfg)
    on_moonshine = bool(cfg.stage_args.get("moonshine"))
    aligner = Aligner(*moonshine.decoder_weights(), vocabulary.texts, **cfg.stage_args["decoder"]) if on_moonshine else None
    for prefix, source in cfg.init.items():
        initialise(model.get_submodule(prefix), source)
    encoder = model.encoder
    frozen = not any(fnmatchcase(f"encoder.{name}", glob) for name, _ in encoder.named_parameters() for glob in cfg.trainable)
    collate = spoken_batches(cfg, built, vocabulary, cached=frozen, aligner=aligner)

    def export() -> dict[str, dict[str, Tensor]]:
        owned = ["listener", "decoder", "ctc_head", *([] if frozen else ["encoder"])]
        weights = {name: model.get_submodule(name).state_dict() for name in owned}
        if on_moonshine:  # the rest comes from the package
            for part in {"encoder", "decoder"} & weights.keys():
                kept = [name for name, p in model.get_submodule(part).named_parameters() if p.requires_grad]
                weights[part] = {name: weights[part][name] for name in kept}
        return weights

    return Stage(model, collate, export)


def asr_model(cfg: TrainConfig) -> tuple[CIFASR, Vocabulary, Built]:
    """The model of stage 1 as it starts, its vocabulary, and what it was built with."""
    args = {name: value for name, value in cfg.stage_args.items() if name not in ("vocabulary", "decoder", "moonshine")}
    built = build(cfg.model, ["speech"], table_only=True)
    vocabulary = Vocabulary.of(built.renderer.tokenizer, cfg.stage_args["vocabulary"])
    encoder: Any = built.model.modalities["speech"].get_submodule("encoder")
    listener = Listener(encoder.width, **cfg.model.modalities["speech"].interface["listener"])
    width = listener.width // listener.parts
    decoder = Decoder(len(vocabulary.texts), width, parts=listener.parts, **cfg.stage_args["decoder"])
    if cfg.stage_args.get("moonshine"):
        import_moonshine(*moonshine.decoder_weights(), vocabulary.texts, decoder)
    return CIFASR(encoder, listener, decoder, vocabulary.spelling, **args), vocabulary, built


def match_stage(cfg: TrainConfig) -> Stage:
    """The first half of stage 2 of speech; ``stage_args``: ``vocabulary`` as in stage 1."""
    built = build(cfg.model, cfg.fresh, table_only=True)
    vocabulary = Vocabulary.of(built.renderer.tokenizer, cfg.stage_args["vocabulary"])
    table = built.model.llm.get_input_embeddings().weight[vocabulary.token_ids]
    modality = built.model.modalities["speech"]
    model = Matcher(modality, table)
    for prefix, source in cfg.init.items():
        initialise(model.get_submodule(prefix), source)

    def export() -> dict[str, dict[str, Tensor]]:
        return {"speech": modality.get_submodule("interface").state_dict()}

    return Stage(model, spoken_batches(cfg, built, vocabulary, cached=True), export)


def spoken_batches(
    cfg: TrainConfig, built: Built, vocabulary: Vocabulary, cached: bool, aligner: Aligner | None = None
) -> Callable[[Families, int | None], Spoken]:
    """Samples of the task ``asr`` to speech with its tokens, and with their times where there is an aligner."""
    collator = Collator(built.renderer, built.processors, built.decoders, built.decode)
    cache = feature_cache(cfg, "speech", built.model.modalities["speech"], collator)
    encoder, processor = moonshine.build(threads=1)  # the aligner's own, which stage 1 does not change
    times: dict[str, Tensor] = {}  # id and text of a sample -> ends of its tokens as shares of its length, at any speed

    def ends(sample: Sample, item: bytes, ids: Tensor) -> Tensor:
        assert aligner is not None
        key = f"{sample.id} {sample.messages[-1].text}"
        if key not in times:
            (frames,) = encoder(**processor([collator.decode("speech", item)])).x
            times[key] = aligner.ends(frames, ids.tolist()) / len(frames)
        return times[key]

    def collate(families: Families, step: int | None) -> Spoken:
        samples = [sample for family in families for sample in family]
        items = [raw(sample.media[0]) for sample in samples]
        ids = [torch.tensor(vocabulary.encode(built.renderer.tokenizer, sample.messages[-1].text)) for sample in samples]
        tokens, token_lengths = nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor([len(row) for row in ids])
        views = drawn_views(cfg, step, len(items))
        if cached:
            media = Media(features=stack(cache(items, views)))
        else:
            decoded = [collator.decode("speech", item, view) for item, view in zip(items, views, strict=True)]
            media = Media(inputs=built.processors["speech"](decoded))
        said = [ends(*each) for each in zip(samples, items, ids, strict=True)] if aligner else None
        return Spoken(media, tokens, token_lengths, nn.utils.rnn.pad_sequence(said, batch_first=True) if said else None)

    return collate


def words_stage(cfg: TrainConfig) -> Stage:
    """Stage 1 of a small image interface, in the LLM's embedding space but without the LLM (words.py); ``stage_args``: ``drop``."""
    built = build(cfg.model, cfg.fresh, table_only=True)
    (name,) = cfg.model.modalities
    modality, tokenizer = built.model.modalities[name], built.renderer.tokenizer
    table = built.model.llm.get_input_embeddings().weight
    feed = open_feed(cfg.data, cfg.data_root, cfg.batch_size, cfg.seed)
    vocabulary, frequency = words.vocabulary(f for step in range(len(feed)) for f in feed.batch(step))
    spelled = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in vocabulary]
    embeds = torch.stack([table[ids].mean(0) for ids in spelled])
    reader = words.WordReader(modality.get_submodule("interface"), embeds, frequency, float(table.std()), **cfg.stage_args)
    cache = feature_cache(cfg, name, modality, Collator(built.renderer, built.processors, built.decoders, built.decode))
    index = {word: i for i, word in enumerate(vocabulary)}

    def collate(families: Families, step: int | None) -> words.WordBatch:
        items = viewed(cache, cfg, step)([raw(family[0].media[0]) for family in families])
        return words.WordBatch(stack(items), words.targets(families, index))

    return Stage(reader, collate, lambda: {name: reader.interface.state_dict()})


def blip2_stage(cfg: TrainConfig) -> Stage:
    """BLIP-2's stage 1 for an image interface (blip2.py); ``stage_args``: arguments of `Blip2`."""
    built = build(cfg.model, cfg.fresh, table_only=True)
    ((name, settings),) = cfg.model.modalities.items()
    modality: Any = built.model.modalities[name]
    feed = open_feed(cfg.data, cfg.data_root, cfg.batch_size, cfg.seed)
    samples = (sample for step in range(len(feed)) for family in feed.batch(step) for sample in family)
    token_ids = sorted({label for sample in samples for label in built.renderer.train(sample).labels if label >= 0})
    former = QFormer(modality.encoder.width, vocab_size=len(token_ids) + NUM_SPECIAL, **settings.interface)
    model = Blip2(Modality(modality.encoder, [former]), token_ids, name, **cfg.stage_args)
    collator = Collator(built.renderer, built.processors, built.decoders, built.decode)
    cache = feature_cache(cfg, name, modality, collator)

    def collate(families: Families, step: int | None) -> Any:
        return collator.train([sample for family in families for sample in family], {name: viewed(cache, cfg, step)})

    return Stage(model, collate, lambda: {"qformer": model.export()})


STAGES: dict[str, Callable[[TrainConfig], Stage]] = {
    "words": words_stage,
    "blip2": blip2_stage,
    "asr": asr_stage,
    "match": match_stage,
    "xllm": xllm_stage,
    "self_critical": self_critical_stage,
}


def compute_dtype(cfg: TrainConfig) -> torch.dtype:
    """bfloat16 where the recipe asks for it and the device has it; an emulating CPU is 4 to 10 times slower than in float32."""
    return torch.bfloat16 if cfg.precision == "bf16" and (torch.cuda.is_available() or bf16_in_hardware()) else torch.float32


def is_trained(module: nn.Module) -> bool:
    """True when any parameter of it is being trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def frozen_layers(prefix: str, interface: nn.Module, trainable: Iterable[str]) -> int:
    """How many of an interface's modules stand before the first one that the globs ``trainable`` train."""
    layers = list(interface.children())
    trained = (
        i
        for i, layer in enumerate(layers)
        for name, _ in layer.named_parameters()
        if any(fnmatchcase(f"{prefix}.{i}.{name}", glob) for glob in trainable)
    )
    return next(trained, len(layers))


def viewed(cache: FeatureCache, cfg: TrainConfig, step: int | None) -> Callable[[list[bytes]], list[Tensor]]:
    """A source of cached features that draws each item's view by seed and step."""
    return lambda items: cache(items, drawn_views(cfg, step, len(items)))


def drawn_views(cfg: TrainConfig, step: int | None, num_items: int) -> list[int]:
    """A view for each item, drawn by seed and step; without a step, the items as they are."""
    rng = random.Random(f"{cfg.seed}/{step}")
    return [0 if step is None else rng.randrange(cfg.views) for _ in range(num_items)]


def feature_cache(cfg: TrainConfig, name: str, modality: Any, collator: Collator) -> FeatureCache:
    """What one modality's frozen part gives, keyed by its weights and settings."""
    assert isinstance(modality, Modality)
    part = cfg.model.modalities[name]
    settings = part.encoder.model_dump_json() + (json.dumps(part.decode, sort_keys=True) if part.decode else "")
    settings += frozen_digest(modality.encoder)
    if modality.num_frozen:
        settings += json.dumps(part.interface, sort_keys=True) + frozen_digest(modality.interface[: modality.num_frozen])
    fingerprint = hashlib.sha256(settings.encode()).hexdigest()

    def encode(items: list[bytes], view: int) -> list[Tensor]:
        features = modality.encode(Media(inputs=collator.process(name, items, view)))
        return [x[:length] for x, length in zip(features.x, features.lengths.tolist(), strict=True)]

    return FeatureCache(cache_dir() / "features", fingerprint, encode)
