"""The web page as a WSGI application."""

from __future__ import annotations

import io
import json
import secrets
import threading
from typing import Any

import flask
from flask.json.provider import DefaultJSONProvider
from PIL import Image
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import HTTPException, InternalServerError, RequestEntityTooLarge

from ..data.images import ImageError, read_image, read_image_size
from ..predictor import MNCPredictor
from .results import MIN_SCORE, ImageResult

# Results that are kept, in memory, for the score and the passes to be changed: enough for a few open pages.
_NUM_KEPT = 8
# The page loads nothing from elsewhere, and what is in it (names of files and classes) can load nothing either.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class PredictionService:
    """Runs a model on one image at a time, whatever is asked at once, and keeps the last results.

    What is wrong with a request is an ``HTTPException`` with a sentence.
    """

    def __init__(self, predictor: MNCPredictor, max_megapixels: float, max_megabytes: float) -> None:
        self.max_megapixels = max_megapixels
        self.max_megabytes = max_megabytes
        self._predictor = predictor
        self._lock = threading.Lock()
        self._kept: dict[str, ImageResult] = {}  # the oldest first

    def predict(self, upload: FileStorage | None) -> dict[str, Any]:
        """Run the model on an uploaded image; return what is found, with the "id" of the result."""
        if upload is None or not upload.filename:
            flask.abort(400, 'There is no image in the request: send one as the field "image" of a form.')
        name = upload.filename
        with self._lock:
            try:
                width, height = read_image_size(name, upload.stream)
                self._check_size(name, width * height / 1e6)
                upload.stream.seek(0)
                image = read_image(name, "BGR", upload.stream)
            except ImageError as error:
                flask.abort(415, str(error))
            result = ImageResult(self._predictor, name, image)
            result_id = secrets.token_hex(8)  # nobody sees the images of others
            self._kept[result_id] = result
            if len(self._kept) > _NUM_KEPT:
                del self._kept[next(iter(self._kept))]
            return {"id": result_id, **result.describe()}

    def _check_size(self, name: str, megapixels: float) -> None:
        if megapixels > self.max_megapixels:
            flask.abort(
                413,
                f"{name} has {megapixels:.1f} megapixels; this page takes {self.max_megapixels:g} at most. "
                "Make it smaller, or start mnc serve with a larger --max-megapixels.",
            )

    def draw(self, result_id: str, view: int, score: float) -> bytes:
        """Return the picture of a view of a result, as PNG."""
        result = self._find(result_id, view)
        file = io.BytesIO()
        with self._lock:  # matplotlib is not made for threads
            Image.fromarray(result.draw(view, score)).save(file, format="PNG")
        return file.getvalue()

    def export(self, result_id: str, view: int, score: float) -> bytes:
        """Return a view of a result as JSON in COCO format."""
        return json.dumps(self._find(result_id, view).views[view].coco.content(score)).encode()

    def _find(self, result_id: str, view: int) -> ImageResult:
        result = self._kept.get(result_id)
        if result is None:
            flask.abort(404, f"The result is no longer there: the last {_NUM_KEPT} are kept. Send the image again.")
        if view >= len(result.views):
            flask.abort(404, f"The result has {len(result.views)} views, counted from 0.")
        return result


def create_app(
    predictor: MNCPredictor, title: str, max_megapixels: float = 16, max_megabytes: float = 32
) -> flask.Flask:
    """Return the application.

    ``POST /predictions`` takes an image as the field "image" of a form and returns JSON with the "id" of the result and
    its "views". ``GET /predictions/ID/VIEW.png?score=0.5`` draws one, ``.json`` has it in COCO format. What is wrong is
    answered with a status of 4xx and JSON, ``{"error": "a sentence"}``.

    Args:
        predictor: the model. MODEL.MNC.OUTPUTS decides whether passes are among the views.
        title: of the page.
        max_megapixels: of an image.
        max_megabytes: of its file.
    """
    app = flask.Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = int(max_megabytes * 1e6)
    app.json = provider = DefaultJSONProvider(app)
    provider.sort_keys = False
    service = PredictionService(predictor, max_megapixels, max_megabytes)

    @app.get("/")
    def page():
        return flask.render_template(
            "page.html",
            title=title,
            class_names=predictor.metadata.thing_classes,
            settings={"minScore": MIN_SCORE, "maxMegabytes": max_megabytes},
            max_megapixels=max_megapixels,
        )

    @app.post("/predictions")
    def predict():
        try:
            upload = flask.request.files.get("image")
        except RequestEntityTooLarge:
            flask.abort(
                413,
                f"The file has more than {max_megabytes:g} MB. Make it smaller, or start mnc serve with a larger "
                "--max-megabytes.",
            )
        return service.predict(upload)

    @app.get("/predictions/<result_id>/<int:view>.png")
    def picture(result_id: str, view: int):
        return flask.Response(service.draw(result_id, view, _score()), mimetype="image/png")

    @app.get("/predictions/<result_id>/<int:view>.json")
    def results(result_id: str, view: int):
        return flask.Response(service.export(result_id, view, _score()), mimetype="application/json")

    app.register_error_handler(HTTPException, _error_in_words)
    app.after_request(_add_headers)
    return app


def _score() -> float:
    """Return the score that a request asks for."""
    text = flask.request.args.get("score", "0.5")
    try:
        return float(text)
    except ValueError:
        flask.abort(400, f"The score must be a number, got {text!r}.")


def _error_in_words(error: HTTPException):
    sentence = error.description
    if isinstance(error, InternalServerError) and error.original_exception is not None:
        cause = error.original_exception
        sentence = f"The model failed: {cause or type(cause).__name__} (the terminal of mnc serve has more)."
    return {"error": sentence}, error.code


def _add_headers(response: flask.Response) -> flask.Response:
    response.headers.update(_HEADERS)
    return response
