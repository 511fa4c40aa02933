"""Speech encoders of transformers: the real loading code on tiny random models, and CTranslate2 files written here."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from x2l.encoders import hf

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def tone(seconds: float, hz: float = 440.0) -> np.ndarray:
    time = np.arange(int(seconds * hf.RATE)) / hf.RATE
    noise = np.random.default_rng(int(seconds * 1000)).normal(0, 0.05, len(time))
    return (0.4 * np.sin(2 * np.pi * hz * time) + noise).astype(np.float32)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whisper")
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def test_whisper_equals_transformers_and_cuts_the_padding(whisper: Path) -> None:
    encoder, process = hf.build_speech(str(whisper))
    waves = [tone(3.01), tone(0.5, 300)]
    reference = transformers.WhisperModel.from_pretrained(whisper).encoder.eval()
    mels = transformers.WhisperFeatureExtractor()(waves, sampling_rate=16000, return_tensors="pt").input_features
    with torch.inference_mode():
        features = encoder.eval()(**process(waves))
        expected = reference(mels).last_hidden_state
    assert features.lengths.tolist() == [151, 25]  # 20 ms a frame, the last one begun
    assert features.x.shape == (2, 151, 32)
    torch.testing.assert_close(features.x[0], expected[0, :151])
    torch.testing.assert_close(features.x[1, :25], expected[1, :25])


def test_whisper_joins_windows_and_ignores_the_batch(whisper: Path) -> None:
    encoder, process = hf.build_speech(str(whisper))
    long, short = tone(31.0), tone(1.0)
    with torch.inference_mode():
        both = encoder.eval()(**process([short, long]))
        alone = encoder(**process([short]))
        head, tail = encoder(**process([long[: 30 * hf.RATE]])), encoder(**process([long[30 * hf.RATE :]]))
    assert both.lengths.tolist() == [50, 1550]
    torch.testing.assert_close(both.x[0, :50], alone.x[0])
    torch.testing.assert_close(both.x[1, :1500], head.x[0])
    torch.testing.assert_close(both.x[1, 1500:], tail.x[0])


def write_ct2(path: Path, variables: dict[str, np.ndarray]) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    kinds = {np.dtype("float32"): 0, np.dtype("int8"): 1, np.dtype("int16"): 2, np.dtype("float16"): 4}
    blob = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        blob += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        blob += struct.pack("<BI", kinds[array.dtype], array.nbytes) + array.tobytes()
    path.write_bytes(blob + struct.pack("<I", 0))


def as_ct2(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A Whisper encoder's state dict under CTranslate2's names, its projections fused."""
    out = {"encoder/num_heads": np.array(4, np.int16), "decoder/embeddings/weight": np.zeros((9, 32), np.float16)}
    norms = {"weight": "gamma", "bias": "beta"}
    names = {"self_attn.out_proj": "self_attention/linear_1", "fc1": "ffn/linear_0", "fc2": "ffn/linear_1"}
    names |= {"self_attn_layer_norm": "self_attention/layer_norm", "final_layer_norm": "ffn/layer_norm"}
    for key, value in state.items():
        path, kind = key.rsplit(".", 1)
        array = value.half().numpy()
        if path == "embed_positions":
            out["encoder/position_encodings/encodings"] = array
        elif not path.startswith("layers."):
            out[f"encoder/{path}/{norms[kind] if path == 'layer_norm' else kind}"] = array
        elif path.endswith("q_proj"):
            k_bias = torch.zeros_like(state[path + ".bias"])
            bias = torch.cat([state[path + ".bias"], k_bias, state[path.replace("q_proj", "v_proj") + ".bias"]])
            weight = torch.cat([state[path.replace("q_proj", f"{p}_proj") + ".weight"] for p in "qkv"])
            prefix = f"encoder/layer_{path.split('.')[1]}/self_attention/linear_0/"
            out[prefix + "weight"], out[prefix + "bias"] = weight.half().numpy(), bias.half().numpy()
        elif not path.endswith(("k_proj", "v_proj")):
            _, layer, rest = path.split(".", 2)
            kind = norms[kind] if rest.endswith("norm") else kind
            out[f"encoder/layer_{layer}/{names[rest]}/{kind}"] = array
    return out


def test_whisper_from_ctranslate2_equals_the_encoder_it_was_made_of(whisper: Path, tmp_path: Path) -> None:
    reference, process = hf.build_speech(str(whisper))
    reference.encoder.half().float()  # the file holds float16
    variables = as_ct2(reference.encoder.state_dict())
    write_ct2(tmp_path / "model.bin", variables)
    encoder, process_ct2 = hf.build_whisper_ct2(str(tmp_path / "model.bin"))
    waves = [tone(1.0), tone(0.4)]
    with torch.inference_mode():
        ours, expected = encoder.eval()(**process_ct2(waves)), reference.eval()(**process(waves))
    torch.testing.assert_close(ours.x, expected.x)
    assert ours.lengths.tolist() == expected.lengths.tolist()


def test_damaged_ctranslate2_files_are_refused(whisper: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    variables = as_ct2(hf.build_speech(str(whisper))[0].encoder.state_dict())
    write_ct2(file, variables)
    whole = file.read_bytes()
    for size in (3, 40, len(whole) // 2):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="ends within"):
            hf.build_whisper_ct2(str(file))
    file.write_bytes(b"GGUF" + whole[4:])
    with pytest.raises(ValueError, match="binary version"):
        hf.build_whisper_ct2(str(file))
    del variables["encoder/conv2/weight"]
    write_ct2(file, variables)
    with pytest.raises(ValueError, match="holds no Whisper encoder"):
        hf.build_whisper_ct2(str(file))


CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (20, 16), "num_feat_extract_layers": 2}
KIN = {
    "wav2vec2": (transformers.Wav2Vec2Model, transformers.Wav2Vec2Config),
    "hubert": (transformers.HubertModel, transformers.HubertConfig),
    "wavlm": (transformers.WavLMModel, transformers.WavLMConfig),
}


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("kind", KIN)
def test_wave_models_do_not_see_their_batch(kind: str, norm: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_class, config_class = KIN[kind]
    config = config_class(
        **SMALL, **CONVOLUTIONS, feat_extract_norm=norm, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=norm == "layer",
    )  # fmt: skip
    model = model_class(config).eval()
    model.save_pretrained(tmp_path)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer")
    extractor.save_pretrained(tmp_path)
    encoder, process = hf.build_speech(str(tmp_path))
    waves = [tone(0.2), tone(0.7), tone(0.001)]
    with torch.inference_mode():
        features = encoder.eval()(**process(waves))
        for wave, x, length in zip(waves[:2], features.x, features.lengths, strict=False):
            values = extractor(wave, sampling_rate=16000, return_tensors="pt").input_values
            expected = model(values).last_hidden_state[0]
            assert len(expected) == length
            torch.testing.assert_close(x[:length], expected, rtol=0, atol=1e-5)
    assert features.lengths[2] == 1  # shorter than one frame: padded to it
    assert features.x.shape == (3, features.lengths.max(), 32)


def test_receptive_field_of_the_published_wav2vec2() -> None:
    assert hf.receptive_field(transformers.Wav2Vec2Config()) == 400  # 25 ms, paper section 4.2


@pytest.mark.parametrize("wave", [np.zeros((2, 8), np.float32), np.zeros(0, np.float32), np.array([0.0, np.nan])])
def test_bad_waveforms_are_refused(whisper: Path, wave: np.ndarray) -> None:
    _, process = hf.build_speech(str(whisper))
    with pytest.raises(ValueError, match="waveform"):
        process([wave])


def test_an_image_model_is_no_speech_encoder(tmp_path: Path) -> None:
    transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=28, patch_size=14)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no speech encoder|cannot load"):
        hf.build_speech(str(tmp_path))
