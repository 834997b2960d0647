"""The page of mnc serve over HTTP, by Flask's test client: results, pictures, limits, errors in words."""

import io
import re
import threading

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from mnc_d2 import load_predictor
from mnc_d2.evaluation.predictions import instances_from_results
from mnc_d2.visualizer import draw_predictions

pytest.importorskip("flask", reason="the extra 'serve' is not installed: pip install flask waitress")

from mnc_d2.serve import create_app  # noqa: E402
from mnc_d2.serve.results import MIN_SCORE  # noqa: E402

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)  # RGB


def encode(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def post(client, content, name="cells.png"):
    return client.post("/predictions", data={"image": (io.BytesIO(content), name)})


@pytest.fixture(scope="module")
def predictor(model_file):
    return load_predictor(model_file, device="cpu", overrides=["MODEL.MNC.OUTPUTS", "('instances', 'passes')"])


@pytest.fixture(scope="module")
def client(predictor):
    return create_app(predictor, "a model", max_megapixels=1, max_megabytes=2).test_client()


@pytest.fixture(scope="module")
def result(client):
    response = post(client, encode(IMAGE))
    assert response.status_code == 200
    return response.json


def test_the_page_loads_nothing_from_elsewhere(client):
    response = client.get("/")
    page = response.text
    assert "a model" in page and "disc, square" in page and "up to 2 MB and 1 megapixels" in page
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none';")


def test_the_final_view_has_what_the_model_finds(result, predictor):
    assert (result["name"], result["height"], result["width"]) == ("cells.png", 64, 80)
    assert [x["title"] for x in result["views"]] == ["Pass 1", "Pass 2", "Final"]
    expected = predictor(IMAGE[:, :, ::-1])["instances"]
    expected = expected[expected.scores >= MIN_SCORE]
    found = result["views"][2]["detections"]
    order = torch.argsort(expected.scores, descending=True, stable=True).tolist()
    assert len(found) == len(order) > 0
    np.testing.assert_allclose([x["score"] for x in found], expected.scores[order], atol=1e-6)
    for x, i in zip(found, order):
        assert x["class"] == ("disc", "square")[expected.pred_classes[i]]
        assert x["area"] == expected.pred_masks[i].sum()


def test_a_pass_shows_its_boxes_and_not_those_under_a_better_one(result, predictor):
    of_pass = predictor(IMAGE[:, :, ::-1])["passes"][0]
    found = result["views"][0]["detections"]
    boxes = {tuple(np.round(box, 2)) for box in of_pass.pred_boxes.tensor.tolist()}
    assert 0 < len(found) < len(of_pass)
    for x, y, width, height in (detection["bbox"] for detection in found):
        assert tuple(np.round((x, y, x + width, y + height), 2)) in boxes
    best = max(found, key=lambda detection: detection["score"])
    assert best["score"] == pytest.approx(of_pass.scores.max().item(), abs=1e-6)


def test_the_score_filters_pictures_and_json_without_the_model(client, predictor):
    result = post(client, encode(IMAGE)).json
    scores = [x["score"] for x in result["views"][2]["detections"]]
    score = (scores[0] + scores[1]) / 2
    calls = []
    hook = predictor.model.register_forward_pre_hook(lambda *_: calls.append(1))
    address = f"/predictions/{result['id']}/2"
    content = client.get(f"{address}.json?score={score}").json
    picture = np.asarray(Image.open(io.BytesIO(client.get(f"{address}.png?score={score}").data)))
    hook.remove()
    assert calls == []
    assert [x["score"] for x in content["annotations"]] == scores[:1]
    assert content["categories"] == [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}]
    assert content["images"] == [{"id": 1, "file_name": "cells.png", "height": 64, "width": 80}]
    instances = instances_from_results(content["annotations"], [1, 2], (64, 80))
    np.testing.assert_array_equal(picture, draw_predictions(IMAGE, instances, predictor.metadata))
    assert client.get(f"{address}.json?score=1").json["annotations"] == []


class OneDisc:
    """A predictor that finds one disc, of 10 x 20 pixels from the corner of the image."""

    def __init__(self, metadata):
        self.metadata = metadata

    def __call__(self, image):
        masks = torch.zeros(1, *image.shape[:2], dtype=torch.bool)
        masks[:, :20, :10] = True
        fields = {"scores": torch.tensor([0.9]), "pred_classes": torch.tensor([0]), "pred_masks": masks}
        boxes = Boxes(torch.tensor([[0.0, 0.0, 10.0, 20.0]]))
        return {"instances": Instances(image.shape[:2], pred_boxes=boxes, **fields)}


@pytest.fixture
def one_disc(predictor):
    return create_app(OneDisc(predictor.metadata), "one disc").test_client()


def test_results_are_in_pixels_of_the_image_and_large_pictures_are_reduced(one_disc, predictor):
    image = np.full((100, 2560, 3), 200, dtype=np.uint8)
    result = post(one_disc, encode(image)).json
    (view,) = result["views"]  # a model without passes
    assert view["detections"][0]["bbox"] == [0, 0, 10, 20] and view["detections"][0]["area"] == 200
    picture = np.asarray(Image.open(io.BytesIO(one_disc.get(f"/predictions/{result['id']}/0.png").data)))
    half = OneDisc(predictor.metadata)(cv2.resize(image, (1280, 50)))["instances"]
    half.pred_boxes.scale(0.5, 0.5)
    half.pred_masks = torch.zeros_like(half.pred_masks)
    half.pred_masks[:, :10, :5] = True
    expected = draw_predictions(cv2.resize(image, (1280, 50)), half, predictor.metadata)
    np.testing.assert_array_equal(picture, expected)


def test_the_last_results_are_kept(one_disc):
    ids = [post(one_disc, encode(IMAGE)).json["id"] for _ in range(9)]
    assert len(set(ids)) == 9
    response = one_disc.get(f"/predictions/{ids[0]}/0.png")
    assert response.status_code == 404 and "Send the image again" in response.json["error"]
    assert one_disc.get(f"/predictions/{ids[1]}/0.json").status_code == 200


def test_one_prediction_runs_at_a_time(predictor):
    inside, met, alone = threading.Lock(), threading.Event(), []

    class Patient(OneDisc):
        def __call__(self, image):
            alone.append(inside.acquire(blocking=False))
            if not alone[-1]:
                met.set()
            met.wait(0.3)  # for another to come in, which ends the wait
            if inside.locked():
                inside.release()
            return super().__call__(image)

    app = create_app(Patient(predictor.metadata), "patient")
    threads = [threading.Thread(target=post, args=(app.test_client(), encode(IMAGE))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alone == [True, True]


@pytest.mark.parametrize(
    ("content", "status", "sentence"),
    [
        (b"not an image", 415, "Image cells.png cannot be read .it is none of BMP, JPEG"),
        (encode(IMAGE)[:300], 415, "Image cells.png cannot be read"),
        (encode(np.zeros((1000, 1500, 3), dtype=np.uint8)), 413, "1.5 megapixels; this page takes 1 at most"),
        (bytes(2_000_001), 413, "more than 2 MB.*--max-megabytes"),
    ],
)
def test_files_that_are_refused(client, content, status, sentence):
    response = post(client, content)
    assert response.status_code == status
    assert re.search(sentence, response.json["error"])


def test_requests_that_are_refused(client, result):
    for path, status, sentence in (
        (f"/predictions/{result['id']}/3.png", 404, "has 3 views"),
        (f"/predictions/{result['id']}/0.png?score=half", 400, "must be a number, got 'half'"),
        ("/nothing", 404, "not found"),
    ):
        response = client.get(path)
        assert response.status_code == status and sentence in response.json["error"]
    response = client.post("/predictions", data={"image": "text"})
    assert response.status_code == 400 and 'as the field "image"' in response.json["error"]


def test_a_model_that_fails_is_said_in_words(predictor):
    class Broken(OneDisc):
        def __call__(self, image):
            raise RuntimeError("out of memory")

    response = post(create_app(Broken(predictor.metadata), "broken").test_client(), encode(IMAGE))
    assert response.status_code == 500 and "The model failed: out of memory" in response.json["error"]
