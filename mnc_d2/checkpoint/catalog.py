"""Pretrained weights by name."""

from __future__ import annotations

from typing import IO, Any

from detectron2.utils.file_io import PathHandler, PathManager
from torchvision.models import get_model_weights


class TorchvisionHandler(PathHandler):
    """Resolves "torchvision://<model>", as in "torchvision://vgg16", to what torchvision trained on ImageNet.

    The file is downloaded once from torchvision's published address and cached by Detectron2's ``PathManager``.
    """

    PREFIX = "torchvision://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path[len(self.PREFIX) :]
        try:
            url = get_model_weights(name).IMAGENET1K_V1.url
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: torchvision publishes no ImageNet weights of a model {name!r}") from error
        return PathManager.get_local_path(url, force=force, **kwargs)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO:
        return PathManager.open(self._get_local_path(path), mode, buffering, **kwargs)


PathManager.register_handler(TorchvisionHandler())
