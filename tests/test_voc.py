"""PASCAL VOC end to end, on a small tree: prepared, trained on and evaluated by the commands of the README."""

import os
import subprocess
import sys

from data.voc_tree import write_sbd, write_voc2012
from programs import ROOT

# The paper's network with thin fully connected layers, on small images.
OVERRIDES = [
    *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "SEED", "1", "DATALOADER.NUM_WORKERS", "0"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "30", "MODEL.RPN.POST_NMS_TOPK_TEST", "30"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2"),
    *("SOLVER.MAX_ITER", "1", "MODEL.MNC.OUTPUTS", "['instances', 'box_instances']"),
]


def test_the_paper_s_config_trains_and_prints_mapr_and_box_ap(tmp_path):
    write_voc2012(tmp_path)
    write_sbd(tmp_path)
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }

    def run(*command):
        command = [sys.executable, *(str(x) for x in command)]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    assert "voc_2012_sds_val.json: 2 images, 3 annotations" in run("datasets/prepare_sbd.py", "--partial")
    config = "configs/PascalVOC-InstanceSegmentation/mnc_VGG_16_5stage.yaml"
    stdout = run("train_net.py", "--config-file", config, *OVERRIDES, "OUTPUT_DIR", tmp_path / "output")
    header, _, *lines = [line.split() for line in stdout[stdout.rindex("dataset ") :].splitlines()]
    assert header == ["dataset", "task", "AP", "AP50", "AP75", "mAPr@50", "mAPr@70", "mAPr_vol"]
    rows = {cells[1]: [float(x) for x in cells[2:]] for cells in lines if cells[:1] == ["voc_2012_sds_val"]}
    # A number in each column of its task, whatever an untrained network reaches.
    assert {task: len(row) for task, row in rows.items()} == {"sds": 3, "bbox": 3, "box_level_bbox": 3}
