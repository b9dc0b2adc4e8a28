"""The tasks on images: what is read and refused, masks and augmentations, what strategies make of them, commands."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.plugins.vision.base import PATCH, SIZE, save_images, tiny_vit

from budwood.contract.loading import build_task
from budwood.contract.types import Generator
from budwood.data.build import build_examples
from budwood.errors import InputError
from budwood.recipe.schema import Recipe
from budwood.training.loop import tune
from budwood_vision.processor import Processor


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vit(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("images"), 12)


def task_of(base: Path, name: str = "image-classification", **options: Any) -> Any:
    task = build_task(name, options)
    task.read_base(base)
    return task


def build(data: Path, task: Any, cache: Path, **options: Any) -> Any:
    return build_examples(data, None, task, 1024, cache_dir=cache, **options)


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it has this size, and holds one row of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * (width + 1)))


# Data.


def test_images_are_read_as_the_base_reads_them(base, images, tmp_path):
    from transformers import AutoImageProcessor

    task = task_of(base)
    examples = build(images, task, tmp_path)
    own = AutoImageProcessor.from_pretrained(base, backend="pil")
    path = sorted(images.glob("*/*"))[3]
    expected = own(Image.open(path).convert("RGB"), return_tensors="np")["pixel_values"][0]
    batch = task.collate([examples[3]], None, None, False)
    assert examples.labels == ["bright", "dark"] and examples.location(3).endswith(f"{path.parent.name}/{path.name}")
    assert torch.allclose(batch.inputs["pixel_values"][0], torch.from_numpy(expected), atol=1e-5)
    assert np.abs(task.processor.shown(expected).astype(int) - examples[3].inputs["pixels"]).max() <= 1
    assert int(examples.lengths[0]) == (SIZE // PATCH) ** 2


def test_paths_bytes_and_folders_are_the_same_examples(base, images, tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(images.glob("*/*"))
    labels = [file.parent.name for file in files]
    task = task_of(base)
    (tmp_path / "images").symlink_to(images)
    named = written(
        tmp_path,
        *({"image": f"images/{f.parent.name}/{f.name}", "label": f.parent.name} for f in files),
    )
    pq.write_table(
        pa.table({"image": [file.read_bytes() for file in files], "label": labels}), tmp_path / "bytes.parquet"
    )
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["bright", "dark"])})
    rows = {"image": [str(file) for file in files], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    expected = build(images, task, tmp_path)
    for data in (named, tmp_path / "bytes.parquet", tmp_path / "saved"):
        found = build(data, task, tmp_path)
        assert found.labels == expected.labels
        for a, b in zip(found, expected, strict=True):
            assert np.array_equal(a.inputs["pixels"], b.inputs["pixels"]) and a.labels == b.labels


def test_a_changed_image_is_noticed(base, tmp_path):
    image = tmp_path / "a.png"
    data = written(tmp_path, {"image": "a.png", "label": "a"}, {"image": "b.png", "label": "b"})
    for path in (image, tmp_path / "b.png"):
        Image.new("RGB", (20, 20), "red").save(path)
    task = task_of(base)
    before = build(data, task, tmp_path / "cache")
    assert build(data, task, tmp_path / "cache").from_cache
    Image.new("RGB", (20, 20), "blue").save(image)
    after = build(data, task, tmp_path / "cache")
    assert not after.from_cache and after.files != before.files
    assert not np.array_equal(after[0].inputs["pixels"], before[0].inputs["pixels"])


def test_a_moved_image_changes_its_class_and_the_hash(base, tmp_path):
    folder = save_images(tmp_path / "images", 4)
    before = build(folder, task_of(base), tmp_path / "cache")
    (folder / "bright" / "0.png").rename(folder / "dark" / "0.png")
    after = build(folder, task_of(base), tmp_path / "cache")
    assert before.sha256 != after.sha256
    assert [int(label) for e in before for label in e.labels] == [0, 0, 1, 1]
    assert [int(label) for e in after for label in e.labels] == [0, 1, 1, 1]


def test_upright_and_grey(tmp_path):
    pixels = np.zeros((8, 4), dtype=np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    task = task_of(tiny_vit(tmp_path / "grey", channels=1))
    [found] = task.read_images([str(tmp_path / "a.png")])
    assert found.shape == (1, SIZE, SIZE) and found[0, 0].max() < 20 and found[0, -1].min() > 235


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty (0 bytes)"),
        (b"no image", "is no image in a known format"),
        (png_header(100_000, 100_000), "more than 89,478,485"),
        (png_header(12_000, 12_000), "12,000 × 12,000 pixels, more than"),
        (png_header(20, 20)[:-9], "does not decode"),
    ],
)
def test_bad_images_are_refused_by_name(base, tmp_path, content, said):
    (tmp_path / "bad.png").write_bytes(content)
    data = written(tmp_path, {"image": "bad.png", "label": "a"})
    with pytest.raises(InputError) as refused:
        build(data, task_of(base), tmp_path)
    assert said in str(refused.value) and "rows.jsonl:1" in str(refused.value) and "bad.png" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "none.png", "label": "a"}, "no file"),
        ({"image": None, "label": "a"}, "not null"),
        ({"image": [1, 2], "label": "a"}, "not list"),
        ({"image": "https://example.org/a.png", "label": "a"}, "is an address"),
        ({"image": "deep.png", "label": "a"}, "more than 8 bits per channel"),
        ({"image": "fine.png", "label": None}, "'label' must be text or a whole number, not null"),
        ({"image": "fine.png", "label": "a", "weight": -1}, "'weight' must be a number of at least 0"),
    ],
)
def test_bad_rows_are_refused(base, tmp_path, row, said):
    Image.new("RGB", (20, 20)).save(tmp_path / "fine.png")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="rows.jsonl:1") as refused:
        build(written(tmp_path, row), task_of(base), tmp_path)
    assert said in str(refused.value)


def test_a_label_that_training_did_not_see(base, images, tmp_path):
    other = save_images(tmp_path / "other", 2, classes=("bright", "dim"))
    with pytest.raises(InputError, match=r"other:dim/1.png: label 'dim' is not in the training data"):
        build(other, task_of(base), tmp_path, labels=["bright", "dark"])


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["a.png", "one/b.png"], "beside folders of images"),
        (["one/b.png", "two/c.txt"], "the folder 'two' of a class has no images"),
        (["train/b.png", "test/c.png"], "holds the splits test, train"),
        (["one/b.txt"], "neither a `datasets` folder nor a folder of data files"),
    ],
)
def test_folders_that_are_ambiguous(base, tmp_path, paths, said):
    for name in paths:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(path, format="png")
    with pytest.raises(InputError) as refused:
        build(tmp_path / "data", task_of(base), tmp_path)
    assert said in str(refused.value)


def test_an_image_longer_than_max_length_is_refused(base, images):
    with pytest.raises(InputError, match=r"an image has 16 patches, .* raise data.max_length to 16"):
        build_examples(images, None, task_of(base), 8)


# Bases.


def test_bases_that_do_not_fit_are_refused(base, tmp_path):
    from budwood.testing import tiny_decoder

    with pytest.raises(InputError, match="'llama' has no AutoModelForImageClassification"):
        task_of(tiny_decoder(tmp_path / "text"))
    with pytest.raises(InputError, match="'vit_mae' has no AutoModelForImageClassification"):
        task_of(tiny_vit(tmp_path / "mae", "mae"))
    with pytest.raises(InputError, match=r"reconstructs patches of 8 pixels .* set encoder_stride to 4"):
        task_of(tiny_vit(tmp_path / "stride", "plain", encoder_stride=8), "masked-image")
    settings = json.loads((base / "preprocessor_config.json").read_text())
    other = tiny_vit(tmp_path / "other")
    (other / "preprocessor_config.json").write_text(json.dumps({**settings, "size": {"height": 8, "width": 8}}))
    with pytest.raises(InputError, match=r"takes images of 16 × 16 pixels .* makes them 8 × 8"):
        task_of(other)
    (other / "preprocessor_config.json").write_text(json.dumps({**settings, "do_resize": False}))
    with pytest.raises(InputError, match="keeps the sizes of images"):
        task_of(other)
    (other / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"has no preprocessor_config.json"):
        task_of(other)


@pytest.mark.parametrize(("share", "what"), [(0.02, "none"), (0.98, "all")])
def test_a_mask_of_nothing_or_everything_is_refused(base, share, what):
    with pytest.raises(InputError, match=f"share: {share} of 16 patches masks {what}: .* give 0.0625 to 0.938"):
        task_of(base, "masked-image", share=share)


# Masks and augmentations.


def test_masks_hold_their_share_and_are_fixed_in_evaluation(base, images, tmp_path):
    task = task_of(base, "masked-image", share=0.75, flip=True, crop=0.3)
    examples = build(images, task, tmp_path)
    masks = [task.vary(examples[0], Generator(0, epoch, 0)).inputs["mask"] for epoch in range(200)]
    assert {int(mask.sum()) for mask in masks} == {12}
    spread = np.mean(masks, axis=0)
    assert np.abs(spread - 0.75).max() < 0.15  # five standard deviations of a mean of 200
    fixed = [task.vary(examples[0], Generator(seed, "eval", 0)) for seed in (0, 0)]
    assert np.array_equal(fixed[0].inputs["mask"], fixed[1].inputs["mask"])
    assert np.array_equal(fixed[0].inputs["pixels"], examples[0].inputs["pixels"]), "nothing is augmented"


@pytest.mark.parametrize("kind", ["masked", "mae"])
def test_the_loss_is_that_of_transformers(kind, images, tmp_path):
    from transformers import ViTForMaskedImageModeling, ViTMAEForPreTraining

    base = tiny_vit(tmp_path / "base", kind)
    task = task_of(base, "masked-image", share=0.75)
    cls: Any = ViTMAEForPreTraining if kind == "mae" else ViTForMaskedImageModeling
    model = cls.from_pretrained(base).eval()
    examples = [task.vary(example, Generator(0, 0, example.key)) for example in build(images, task, tmp_path)][:3]
    batch = task.collate(examples, model, None, False)
    with torch.no_grad():
        outputs = task.outputs(model, batch)
        losses = task.loss(task.logits(outputs, batch), batch.labels)
        expected = model(**batch.inputs).loss
    assert len(losses) == 3 * 12 and batch.width == 16
    assert float(losses.mean()) == pytest.approx(float(expected), rel=1e-4)  # theirs adds 1e-5 to the count of patches


def test_augmentations_keep_the_size_and_are_determined_by_their_key(base, images, tmp_path):
    task = task_of(base, flip=True, crop=0.5, rotate=30)
    example = build(images, task, tmp_path)[0]
    first, again, other = (task.vary(example, Generator(0, epoch, 0)).inputs["pixels"] for epoch in (0, 0, 1))
    assert first.shape == example.inputs["pixels"].shape and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    mirrored = task_of(base, flip=True)
    found = {mirrored.vary(example, Generator(0, epoch, 0)).inputs["pixels"].tobytes() for epoch in range(30)}
    pixels = example.inputs["pixels"]
    assert found == {pixels.tobytes(), np.ascontiguousarray(pixels[:, :, ::-1]).tobytes()}


def test_a_processor_that_does_more_is_refused(base, monkeypatch):
    real = Processor._call

    def squared(self: Any, image: np.ndarray, values: bool = False) -> np.ndarray:
        found = real(self, image, values)
        return found**2 if values else found

    monkeypatch.setattr(Processor, "_call", squared)
    with pytest.raises(InputError, match="does more to an image's values"):
        Processor(base, 3)


# Runs.


def recipe(
    base: Path, data: Path, output: Path, strategies: list[Any], task: str, quantization: str = "none", **train: Any
) -> Recipe:
    steps = {"steps": 3, "batch_examples": 6, "micro_tokens": 48, "precision": "fp32", "learning_rate": 3e-3}
    return Recipe.from_dict(
        {
            "base": {"model": str(base), "quantization": quantization, "device": "cpu", "task": task},
            "data": {"train": str(data), "eval": str(data), "max_length": 16},
            "strategies": strategies,
            "train": {**steps, **train},
            "output": str(output),
        }
    )


LORA = {"lora": {"rank": 2}}


@pytest.mark.parametrize("task", ["image-classification", "masked-image"])
@pytest.mark.parametrize(
    "strategies",
    [
        [LORA, {"adversarial": {"method": "freelb", "steps": 2}}],
        [{"adalora": {"initial_rank": 3, "target_rank": 2, "interval": 1}}, "ema"],
        [LORA, {"adversarial": {"method": "neftune"}}],
    ],
    ids=["freelb", "adalora-ema", "neftune"],
)
def test_strategies_run_on_images(base, images, tmp_path, task, strategies):
    run = tune(recipe(base, images, tmp_path / "run", strategies, task, steps=4))
    assert np.isfinite(run.metrics["eval_loss"])


def test_noise_is_one_vector_a_patch_and_independent_of_the_batch(base, images, tmp_path):
    fgm = {"adversarial": {"method": "fgm", "relative_epsilon": 0.5}}
    losses = []
    for number, tokens in enumerate((96, 16)):
        made = recipe(base, images, tmp_path / str(number), [LORA, fgm], "image-classification", micro_tokens=tokens)
        run = tune(made)
        losses.append(run.metrics["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_meaningless_combinations_are_refused_by_name(base, images, tmp_path):
    for strategies, task, said in (
        ([LORA, {"label-smoothing": {}}], "masked-image", "masked-image"),
        ([{"trainable_tokens": {"tokens": [1]}}], "image-classification", "cannot hold 'classifier'"),
        (
            [LORA, {"adversarial": {"method": "vat"}}],
            "masked-image",
            "distributions .*'masked-image' .* has none",
        ),
        ([LORA, {"dpo": {}}], "image-classification", "'dpo' .* trains on preference pairs"),
        ([LORA, {"adversarial": {"skip_masked": True}}], "image-classification", "skip_masked"),
    ):
        with pytest.raises(InputError, match=said):
            tune(recipe(base, images, tmp_path / "run", strategies, task))


def test_a_classifier_learns_and_survives_pretraining(base, images, tmp_path, monkeypatch):
    """From a masked-image run, merged, to a classifier, its attack, its answers, and the commands on the way."""
    from typer.testing import CliRunner

    from budwood.cli.app import app

    def command(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    masked = tune(recipe(base, images, tmp_path / "masked", [LORA], "masked-image", steps=6))
    assert masked.metrics["eval_loss"] < masked.before["eval_loss"]
    merged = tmp_path / "merged"
    command("adapter", "merge", tmp_path / "masked" / "adapter", merged, "--dtype", "fp32")
    assert (merged / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()
    made = recipe(merged, images, tmp_path / "run", [LORA], "image-classification", steps=12, learning_rate=1e-2)
    run = tune(made)
    assert run.metrics["eval_accuracy"] == 1.0 and "dark" in run.task.report
    adapter = tmp_path / "run" / "adapter"
    evaluated = json.loads(
        command("eval", adapter, "--data", images, "--attack", "pgd:steps=2,relative_epsilon=1", "--json")
    )
    assert evaluated["adapter"]["eval_accuracy"] == 1.0
    paths = [images / "bright" / "0.png", images / "dark" / "1.png"]
    asked = ["--image", paths[0], "--image", paths[1]]
    answers = json.loads(command("generate", merged, "--adapter", f"a={adapter}", *asked, "--json"))["answers"]
    assert [(a["adapter"], a["image"], a["label"]) for a in answers] == [
        ("a", str(paths[0]), "bright"), ("a", str(paths[1]), "dark")
    ]  # fmt: skip
    shown = command("generate", merged, "--adapter", f"a={adapter}", "--image", paths[0])
    assert shown.startswith("a: bright (")
    [filled] = json.loads(
        command("generate", base, "--adapter", f"m={tmp_path / 'masked' / 'adapter'}", "--image", paths[0], "--json")
    )["answers"]
    assert len(filled["masked"]) == 10 and filled["grid"] == [4, 4] and filled["error"] > 0
    assert Image.open(io.BytesIO(base64.b64decode(filled["picture"]))).width > 300


def test_asking_the_wrong_thing_is_refused_before_the_base_loads(base, images, tmp_path, monkeypatch):
    from budwood.cli.generate import _check_asked

    for task, image, prompt, said in (
        ("image-classification", [], True, "give --image FILE"),
        ("causal-lm", [Path("a.png")], False, "answers texts: give --prompt"),
        ("image-classification", [Path("a.png")], True, "not both"),
        ("image-classification", [Path("none.png")], False, "no file 'none.png'"),
    ):
        with pytest.raises(InputError, match=said):
            _check_asked(task, {}, image, prompt, [])
    with pytest.raises(InputError, match="no image 'none.png'"):
        task_of(base).read_images(["none.png"])


def test_a_sheet_shows_masks(base, images, tmp_path):
    task = task_of(base, "masked-image", share=0.5)
    example = build(images, task, tmp_path)[0]
    white = replace(example, inputs={**example.inputs, "pixels": np.full((3, SIZE, SIZE), 255, dtype=np.uint8)})
    sheet = Image.open(io.BytesIO(task.sheet([white, white], ["one", "two"])))
    grey = (np.asarray(sheet)[..., 0] == 127).sum() / 2
    assert grey == 128 * 128 / 2
    pieces = task.show(white, None)
    assert sum(piece.count("■") for piece, loss in pieces if loss) == 8


def test_stock_checkpoints_without_a_mask_token_can_be_masked(images, tmp_path):
    base = tiny_vit(tmp_path / "base", "plain")
    run = tune(recipe(base, images, tmp_path / "run", [LORA], "masked-image"))
    assert run.base.new and not any("mask_token" in name for name in run.base.new)
    assert SimpleNamespace(**run.metrics).eval_loss > 0


def test_an_mae_in_4_bits_is_verified_and_attacked_but_not_served(images, tmp_path):
    from budwood.serving.http.start import open_service
    from budwood.serving.verify import verify
    from budwood.training.evaluate import evaluate_adapter

    base = tiny_vit(tmp_path / "base", "mae", intermediate_size=512)  # most weights are in linears
    tune(recipe(base, images, tmp_path / "run", [LORA], "masked-image", quantization="nf4"))
    adapter = tmp_path / "run" / "adapter"
    assert verify(adapter, device="cpu").exact
    found = evaluate_adapter(adapter, images, attacks=["pgd:steps=2,relative_epsilon=1"], device="cpu", quiet=True)
    assert found.attacks["pgd:steps=2,relative_epsilon=1"]["eval_loss"] > found.adapter["eval_loss"]
    with pytest.raises(InputError, match="no typos for the data format 'image'"):
        evaluate_adapter(adapter, images, attacks=["typos"], device="cpu", quiet=True)
    settings: Any = None
    with pytest.raises(InputError, match="the server takes texts, and task 'masked-image' answers images"):
        open_service(str(base), settings, settings, None, print, task="masked-image")


def test_embeddings_train_whole_in_fp32_beside_norms_in_16_bit(base, images, tmp_path):
    from budwood.serving.verify import verify

    whole = [{"lora": {"rank": 2, "modules_to_save": ["vit.embeddings"]}}]
    run = tune(recipe(base, images, tmp_path / "run", whole, "image-classification", precision="bf16"), quiet=True)
    assert verify(run.directory / "adapter").exact
