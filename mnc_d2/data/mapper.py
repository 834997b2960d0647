"""From a dataset's record to the training Instances of MNC: every instance has a mask tensor, not every one a mask."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks
from fvcore.common.registry import Registry

from .images import read_image
from .resize import build_test_resize, build_train_resize

__all__ = ["DATASET_MAPPER_REGISTRY", "MNCDatasetMapper", "build_mapper"]

DATASET_MAPPER_REGISTRY = Registry("DATASET_MAPPER")
DATASET_MAPPER_REGISTRY.__doc__ = "Dataset mappers by their names, for INPUT.DATASET_MAPPER_NAME."


def build_mapper(cfg: CfgNode, is_train: bool) -> MNCDatasetMapper:
    """Build the mapper that INPUT.DATASET_MAPPER_NAME names."""
    return DATASET_MAPPER_REGISTRY.get(cfg.INPUT.DATASET_MAPPER_NAME)(cfg, is_train)


@DATASET_MAPPER_REGISTRY.register()
class MNCDatasetMapper(DatasetMapper):
    """Detectron2's DatasetMapper for mixed supervision: some instances have masks, others only boxes.

    The training Instances always have all of these fields, also with no instance at all (G = 0):

    * ``gt_boxes``: Boxes (G, 4), absolute x1, y1, x2, y2 in the transformed image;
    * ``gt_classes``: int64 (G,);
    * ``gt_masks``: BitMasks (G, H, W), whatever format the dataset has; all zero where there is no mask;
    * ``gt_has_mask``: bool (G,), False where the instance has a box only, so that its mask loss is left out.

    Crowd annotations are dropped. So is an instance whose box or whose mask became empty, by cropping for example; one
    that never had a mask is kept.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        instance_mask_format: str = "bitmask",
        **kwargs: Any,
    ):
        """
        Args:
            is_train: whether to give the ground truth along with the image.
            instance_mask_format: must be "bitmask".
            kwargs: as for DatasetMapper.

        Raises:
            ValueError: another mask format.
        """
        if instance_mask_format != "bitmask":
            raise ValueError(
                f"INPUT.MASK_FORMAT is '{instance_mask_format}'. MNC needs 'bitmask'; annotations may be of any format."
            )
        super().__init__(is_train, instance_mask_format=instance_mask_format, **kwargs)

    @classmethod
    def from_config(cls, cfg, is_train: bool = True) -> dict[str, Any]:
        arguments = super().from_config(cfg, is_train)
        resize = build_train_resize(cfg) if is_train else build_test_resize(cfg)
        augmentations = [resize if isinstance(x, T.ResizeShortestEdge) else x for x in arguments["augmentations"]]
        return {**arguments, "augmentations": augmentations}

    @classmethod
    def check_files(cls, cfg: CfgNode, dataset_names: Iterable[str]) -> None:
        """Check, before a run, the files that the mapper reads beside images; this one reads none.

        Raises:
            FileNotFoundError, ValueError: a file is missing or bad; the message names it.
        """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Read and transform one image, and in training its annotations.

        Args:
            dataset_dict: a record in Detectron2's dataset format; it is not changed.

        Returns:
            The record with "image" ((3, H, W); uint8, or float32 with INPUT.EXACT_SCALE_TEST), in training
            "instances" in place of "annotations", and "proposals" if :meth:`add_proposals` has any.

        Raises:
            OSError: the image cannot be read; the message names the file.
            detectron2.data.detection_utils.SizeMismatchError: the image's size is not the record's.
        """
        record = copy.deepcopy(dataset_dict)
        image = read_image(record["file_name"], self.image_format)
        utils.check_image_size(record, image)
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        image_size = augmented.image.shape[:2]
        # No ascontiguousarray: it leaves a side of one pixel its negative stride of a flip, which PyTorch refuses.
        record["image"] = torch.as_tensor(augmented.image.transpose(2, 0, 1).copy())
        self.add_proposals(record, transforms, image_size)
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, image_size)
        return record

    def add_proposals(self, record: dict[str, Any], transforms: T.TransformList, image_size: tuple[int, int]) -> None:
        """Put "proposals" into a record, where there are precomputed ones (MODEL.LOAD_PROPOSALS).

        Args:
            record: of the dataset.
            transforms: what was done to the image.
            image_size: (height, width) after that.
        """
        if self.proposal_topk is not None:
            utils.transform_proposals(record, image_size, transforms, proposal_topk=self.proposal_topk)

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.TransformList, image_shape: tuple[int, int]
    ) -> None:
        """Replace `dataset_dict["annotations"]` by "instances" in the transformed image of (H, W) `image_shape`."""
        annos = [anno for anno in dataset_dict.pop("annotations") if anno.get("iscrowd", 0) == 0]
        has_mask = torch.zeros(len(annos), dtype=torch.bool)
        for i, anno in enumerate(annos):
            segmentation = anno.pop("segmentation", None)
            if self.use_instance_mask and segmentation:
                has_mask[i] = True
                if self.recompute_boxes and isinstance(segmentation, list):
                    # Cropping polygons takes a package (shapely) that Detectron2 does not require; pixels do not.
                    polygons = mask_util.frPyObjects(segmentation, dataset_dict["height"], dataset_dict["width"])
                    segmentation = mask_util.merge(polygons)
                anno["segmentation"] = segmentation
            if not self.use_keypoint:
                anno.pop("keypoints", None)
            utils.transform_instance_annotations(
                anno, transforms, image_shape, keypoint_hflip_indices=self.keypoint_hflip_indices
            )
            if isinstance(anno.get("segmentation"), np.ndarray):
                anno["segmentation"] = anno["segmentation"].copy()  # as the image
            if not has_mask[i]:
                anno["segmentation"] = np.zeros(image_shape, dtype=np.uint8)

        instances = utils.annotations_to_instances(annos, image_shape, mask_format=self.instance_mask_format)
        if not annos:
            instances.gt_masks = BitMasks(torch.zeros(0, *image_shape, dtype=torch.bool))
        instances.gt_has_mask = has_mask
        if self.recompute_boxes:
            # A mask that was cut is tighter than its box cut in the same way.
            tight = instances.gt_masks.get_bounding_boxes()
            instances.gt_boxes.tensor[has_mask] = tight.tensor[has_mask]

        instances = utils.filter_empty_instances(instances, by_mask=False)
        dataset_dict["instances"] = instances[instances.gt_masks.nonempty() | ~instances.gt_has_mask]
