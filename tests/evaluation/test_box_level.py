"""The evaluator that passes box-level results on."""

import pytest
from detectron2.evaluation import DatasetEvaluator

from mnc_d2.evaluation import BoxLevelEvaluator


class Count(DatasetEvaluator):
    """Counts what it is given."""

    def reset(self):
        self.seen = []

    def process(self, inputs, outputs):
        self.seen += outputs

    def evaluate(self):
        return {"bbox": {"AP": len(self.seen)}} if self.seen else None


def test_box_instances_are_evaluated_under_another_name():
    inner = Count()
    evaluator = BoxLevelEvaluator(inner)
    evaluator.reset()
    assert evaluator.evaluate() is None  # what COCOEvaluator returns in all processes but the main one
    evaluator.process([{}, {}], [{"instances": "masks", "box_instances": name} for name in "ab"])
    assert inner.seen == [{"instances": "a"}, {"instances": "b"}]
    assert evaluator.evaluate() == {"box_level_bbox": {"AP": 2}}


def test_a_model_without_box_instances_is_an_error_that_names_the_keys():
    evaluator = BoxLevelEvaluator(Count())
    evaluator.reset()
    with pytest.raises(ValueError, match="MODEL.MNC.OUTPUTS.*MODEL.META_ARCHITECTURE"):
        evaluator.process([{}], [{"instances": "masks"}])
