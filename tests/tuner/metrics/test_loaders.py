"""Real loading code on tiny local models: what is read, what is computed from it, what is refused.

CLIP against open_clip directly, detectors against their own logits, strictness, and a clear word offline.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from stagevar.errors import UsageError
from stagevar.prompts.class_names import class_name
from stagevar.prompts.geneval import COLORS
from tests.fakes import metric_models
from tuner.metrics import create
from tuner.metrics.clip import ClipModel, ColorClassifier
from tuner.metrics.geneval import GenEval, Mask2Former, load_detector, mask_box
from tuner.metrics.model_files import read_state_dict
from tuner.metrics.prompt_sets import COCO_CLASSES
from tuner.metrics.vqa import DpgBench, TransformersVqa, first_word, tile_images


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (3, 50, 70, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pictures(pixels):
    return [Image.fromarray(image) for image in pixels]


@pytest.fixture(scope="module")
def clip_name(tmp_path_factory):
    return metric_models.clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def offline(monkeypatch):
    """No network: hubs answer from their caches only, and torch's downloads fail at once."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def refuse(*arguments, **options):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)


# CLIP --------------------------------------------------------------------------------------------------------------


def test_clip_score_is_a_hundred_times_the_cosine_that_open_clip_gives(clip_name, pixels):
    import open_clip

    texts = ["a photo of a dog", "two cats", "x"]
    model, _, preprocess = open_clip.create_model_and_transforms(clip_name)
    model.eval()
    with torch.no_grad():
        image_BD = model.encode_image(torch.stack([preprocess(Image.fromarray(image)) for image in pixels]))
        text_BD = model.encode_text(open_clip.get_tokenizer(clip_name)(texts))
    expected = 100 * torch.nn.functional.cosine_similarity(image_BD, text_BD).clamp(min=0).numpy()
    values = create("clip_score", model=clip_name, batch_size=2).score(pixels, texts)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    assert values.max() > 0


def test_a_local_weights_file_serves_as_pretrained(clip_name, tmp_path):
    import open_clip

    torch.manual_seed(1)
    model = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "local.pt")
    loaded = ClipModel("ViT-S-32-alt", str(tmp_path / "local.pt"))
    assert torch.equal(loaded.model.visual.conv1.weight, model.visual.conv1.weight)
    assert loaded.source == "ViT-S-32-alt/local.pt" and len(loaded.describe()["weights_sha256"]) == 64
    torch.save({"state_dict": {"visual.conv1.weight": torch.zeros(1)}}, tmp_path / "wrong.pt")
    with pytest.raises(UsageError, match="cannot be loaded"):
        ClipModel("ViT-S-32-alt", str(tmp_path / "wrong.pt"))


def test_unknown_clips_are_refused_before_anything_loads():
    with pytest.raises(UsageError, match="no architecture 'ViT-Z'"):
        ClipModel("ViT-Z")
    with pytest.raises(UsageError, match=r"'openay' is neither a file nor a tag \(openai"):
        ClipModel("ViT-L-14", "openay")


def test_the_color_is_the_argmax_over_ten_averaged_sentences(clip_name, pictures):
    classifier = ColorClassifier(model=clip_name)
    image, box = pictures[0], (10.4, 5.0, 40.6, 45.0)
    mask = np.zeros((50, 70), dtype=bool)
    mask[10:40, 15:35] = True
    cut = np.full((50, 70, 3), 0x99, dtype=np.uint8)
    cut[mask] = np.asarray(image)[mask]
    feature_D = classifier.clip.image_features([Image.fromarray(cut).crop((10, 5, 41, 45))])[0]
    scores = []
    for color in COLORS:
        text_3D = classifier.clip.text_features(
            [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
        )
        mean_D = text_3D.mean(0)
        scores.append(float(feature_D @ (mean_D / mean_D.norm())))
    assert classifier(image, "dog", [box], [mask]) == [COLORS[int(np.argmax(scores))]]
    assert classifier(image, "dog", []) == []


# Detectors ---------------------------------------------------------------------------------------------------------


def test_detectors_words_become_genevals():
    assert [class_name(label) for label in ("Mouse", "tvmonitor", "sofa", "hair drier", "stop_sign", "zebra")] == [
        "computer mouse",
        "tv",
        "couch",
        "hair drier",
        "stop sign",
        "zebra",
    ]
    assert mask_box(np.array([[0, 0, 0], [0, 1, 1], [0, 1, 0]], dtype=bool)) == (1.0, 1.0, 3.0, 3.0)


@pytest.mark.parametrize("kind", ["mask2former", "rtdetr", "owlv2"])
def test_detectors_load_from_a_folder_and_stay_in_their_terms(kind, tmp_path, pictures):
    folder = getattr(metric_models, f"{kind}_folder")(tmp_path)
    detector = load_detector(kind, folder)
    floor = 0.005
    found = detector(pictures[:2], floor)
    assert [len(objects) > 0 for objects in found] == [True, True]
    for item in found[0] + found[1]:
        assert item.class_name in COCO_CLASSES and floor < item.score <= 1 and len(item.box_xyxy) == 4
        assert (item.mask_HW is not None) == (kind == "mask2former")
    assert [[item.box_xyxy for item in objects] for objects in detector(pictures[:1], floor)] == [
        [item.box_xyxy for item in found[0]]
    ]
    assert detector(pictures[:1], 1.0) == [[]]
    assert detector.describe() == {"kind": kind, "model": folder}


def test_mask2former_scores_and_boxes_come_from_its_logits(tmp_path):
    detector = Mask2Former(metric_models.mask2former_folder(tmp_path), "cpu")
    class_QC = torch.full((2, 81), -10.0)
    class_QC[0, 16] = 10.0  # a sure dog
    class_QC[1, 80] = 10.0  # nothing
    masks_QHW = torch.full((2, 8, 8), -4.0)
    masks_QHW[0, 2:6, 4:8] = 4.0
    (found,) = detector._decode(class_QC, masks_QHW, 8, 8, floor=0.3)
    assert found.class_name == "dog" and found.box_xyxy == (4.0, 2.0, 8.0, 6.0)
    assert found.score == pytest.approx(torch.sigmoid(torch.tensor(4.0)).item(), rel=1e-3)
    (larger,) = detector._decode(class_QC, masks_QHW, 16, 16, floor=0.3)
    assert larger.box_xyxy == pytest.approx((8.0, 4.0, 16.0, 12.0), abs=1)
    assert detector._decode(class_QC, masks_QHW, 8, 8, floor=0.99) == []


def test_a_detector_of_other_classes_is_refused(tmp_path):
    labels = {0: "dog", 1: "spaceship"}
    with pytest.raises(UsageError, match="does not know 79 of GenEval's classes"):
        load_detector("rtdetr", metric_models.rtdetr_folder(tmp_path, labels))


def test_missing_weights_are_an_error_and_not_noise(tmp_path):
    folder = metric_models.rtdetr_folder(tmp_path)
    state = read_state_dict(tmp_path / "model.safetensors")
    from safetensors.torch import save_file

    save_file(
        {key: value for key, value in state.items() if "enc_output" not in key},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UsageError, match=r"lacks \d+ weights of RTDetrForObjectDetection"):
        load_detector("rtdetr", folder)


def test_geneval_colors_only_what_the_prompt_colors(pixels):
    from tuner.metrics.geneval import Found

    class Fixed:
        def __call__(self, images, floor):
            return [
                [
                    Found("dog", 0.95, (0, 0, 9, 9)),
                    Found("dog", 0.5, (0, 0, 8, 8)),
                    Found("cup", 0.35, (0, 0, 5, 5)),
                    Found("cup", 0.3, (0, 0, 5, 5)),
                ]
                for _ in images
            ]

        def describe(self):
            return {"kind": "fixed"}

    asked = []

    def say_red(image, class_name, boxes_xyxy, masks_HW=None):
        asked.append((class_name, len(boxes_xyxy), masks_HW))
        return ["red"] * len(boxes_xyxy)

    metric = GenEval(detector=Fixed(), color_classifier=say_red)
    prompts = [
        {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "x"},
        {"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "blue"}], "prompt": "y"},
        {
            "tag": "counting",
            "include": [{"class": "dog", "count": 1}],
            "exclude": [{"class": "dog", "count": 2}],
            "prompt": "z",
        },
    ]
    rows = metric.rows(pixels, prompts)
    assert [row["value"] for row in rows] == [1.0, 0.0, 1.0]
    assert asked == [("dog", 2, None), ("cup", 1, None)]
    assert rows[0]["detections"][0] == {"class": "dog", "score": 0.95, "box": [0, 0, 9, 9], "color": "red"}
    assert metric.summary(rows, prompts)["tags"] == {"colors": 1.0, "color_attr": 0.0, "counting": 1.0}
    with pytest.raises(UsageError, match="no GenEval metadata"):
        metric.score(pixels, ["a dog"] * 3)


# VQA ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vilt", "blip"])
def test_question_answerers_load_from_a_folder(kind, tmp_path, pictures):
    vqa = TransformersVqa(getattr(metric_models, f"{kind}_folder")(tmp_path))
    answers = vqa(pictures, "is there a cat?")
    assert len(answers) == 3 and all(answer == first_word(answer) for answer in answers)
    if kind == "vilt":
        assert set(answers) <= {"yes", "no"}
    assert vqa.describe()["kind"] == kind


def test_answers_are_cut_to_their_first_word():
    assert [first_word(text) for text in ("Yes.", " no, there is", "YES!", "...", "")] == ["yes", "no", "yes", "", ""]


def test_dpg_asks_every_tile_in_order(tmp_path):
    (tmp_path / "q.csv").write_text(metric_models.QUESTIONS + "b,two,k,1,0,entity,whole,entity - whole (x),is it?\n")
    grid = np.zeros((8, 8, 3), dtype=np.uint8)
    grid[:4, 4:] = grid[4:, :4] = 255  # bright: top right, bottom left
    metric = DpgBench(questions=str(tmp_path / "q.csv"), tiles=4, vqa=metric_models.AnswersYes())
    (row,) = metric.rows(grid[None], ["a photo of a dog"])
    assert row["answers"] == {"1": ["no", "yes", "yes", "no"], "2": ["no", "yes", "yes", "no"]}
    assert row["value"] == 0.5 and row["item_id"] == "a"
    summary = metric.summary([row], ["a photo of a dog"])
    assert summary["corrected"]["score"] == 50.0 and summary["corrected"]["l2"]["attribute - color"] == 50.0
    assert summary["published"]["score"] is None and "a" in summary["published"]["dropped"]
    assert metric.item_id({"item_id": "b", "prompt": "anything"}) == "b"
    with pytest.raises(UsageError, match="no questions for prompt"):
        metric.item_id("unheard of")
    with pytest.raises(UsageError, match="does not divide into four"):
        tile_images(Image.new("RGB", (7, 8)), 4)


def test_four_images_of_an_item_count_as_its_four_tiles(tmp_path):
    (tmp_path / "q.csv").write_text(metric_models.QUESTIONS)
    metric = DpgBench(questions=str(tmp_path / "q.csv"), vqa=metric_models.AnswersYes())
    images = np.zeros((4, 4, 4, 3), dtype=np.uint8)
    images[0] = 255
    rows = metric.rows(images, ["a photo of a dog"] * 4)
    assert metric.summary(rows, [""] * 4)["corrected"]["score"] == 25.0


# Offline and hostile files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip_score", {}),
        ("hpsv2", {}),
        ("image_reward", {}),
        ("pickscore", {}),
        ("geneval2", {"questions": "geneval2_data.jsonl"}),
        ("dino", {"model": "facebook/dino-none"}),
        ("lpips", {}),
        ("dists", {}),
        ("fid", {}),
        ("geneval", {"detector_model": "facebook/none", "color_classifier": metric_models.FixedColor()}),
    ],
)
def test_offline_the_refusal_says_what_to_do(name, options, offline, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "geneval2_data.jsonl").write_text(metric_models.GENEVAL2)
    monkeypatch.chdir(tmp_path)
    torch.hub.set_dir(str(tmp_path))
    try:
        with pytest.raises(UsageError, match=r"cannot be loaded .* download it on a machine with a network"):
            create(name, **options)
    finally:
        torch.hub._hub_dir = None


def test_files_that_are_not_plain_tensors_are_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save(Payload(), tmp_path / "evil.pt")
    (tmp_path / "noise.safetensors").write_bytes(b"\x00" * 40)
    torch.save([1, 2], tmp_path / "list.pt")
    for file in ("evil.pt", "noise.safetensors", "list.pt", "none.pt"):
        with pytest.raises(UsageError, match="weights file"):
            read_state_dict(tmp_path / file)
        with pytest.raises(UsageError, match="weights file"):
            create("lpips", weights=str(tmp_path / file))


def test_trunks_of_another_network_are_refused(tmp_path):
    alex = metric_models.trunk_file(tmp_path, "alex")
    with pytest.raises(UsageError, match="does not fit vgg"):
        create("dists", weights=alex)


def test_lpips_is_the_package_with_the_given_trunk(tmp_path, pixels):
    import lpips

    from tuner.metrics.pixels import to_unit_range

    weights = metric_models.trunk_file(tmp_path, "alex")
    ours = create("lpips", weights=weights)
    direct = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = read_state_dict(weights)
    for name, tensor in direct.net.state_dict().items():
        tensor.copy_(state["features." + name.split(".", 1)[1]])
    a, b = (to_unit_range(pixels[index : index + 1], "cpu") for index in (0, 1))
    with torch.no_grad():
        expected = direct(a, b, normalize=True).item()
    assert ours.score(pixels[:1], [""], pixels[1:2])[0] == pytest.approx(expected, rel=1e-5)


def test_a_copied_model_folder_needs_nothing_else(tmp_path, pictures):
    folder = metric_models.dino_folder(tmp_path)
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    shutil.move(folder, moved)
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    assert np.allclose(create("dino", model=str(moved)).score(pixels, [""] * 3, pixels), 1.0, atol=1e-5)
    assert json.loads((moved / "config.json").read_text())["model_type"] == "vit"
