"""Reading the parameters of a Caffe model, from HDF5 or from a binary protobuf, without Caffe."""

from __future__ import annotations

import os

import numpy as np

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_INSTALL = "Install it with: pip install 'mnc_d2[caffe]'"


def read_caffe_model(path: str | os.PathLike) -> dict[str, list[np.ndarray]]:
    """Read the parameters of each layer of a Caffe model.

    Args:
        path: a .caffemodel.h5 or a .caffemodel; which of them, the content tells.

    Returns:
        by layer name, in the order of the file, the float32 arrays of the layer: mostly weight and bias. Layers without
        parameters of their own have none.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package that reads this format, h5py or protobuf, is not installed.
        ValueError: the file is neither format, or is damaged.
    """
    with open(path, "rb") as file:
        is_hdf5 = file.read(len(_HDF5_SIGNATURE)) == _HDF5_SIGNATURE
    layers = _read_hdf5(path) if is_hdf5 else _read_protobuf(path)
    if not any(layers.values()):
        raise ValueError(f"{path} is not a Caffe model with parameters: neither HDF5 nor a binary .caffemodel.")
    return layers


def _read_hdf5(path: str | os.PathLike) -> dict[str, list[np.ndarray]]:
    """Read what Caffe's ToHDF5 writes: data/<layer>/<index of the parameter>."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path} is an HDF5 file, which needs the package h5py. {_INSTALL}") from error
    try:
        with h5py.File(path, "r") as file:
            # A small file can claim arrays of any size.
            datasets = [dataset for group in file["data"].values() for dataset in group.values()]
            claimed, size = sum(dataset.nbytes for dataset in datasets), os.path.getsize(path)
            if claimed > 2000 * size:  # HDF5 compresses zeros to a thousandth
                raise ValueError(f"it claims {claimed} bytes of parameters in {size}")
            return {
                name: [np.asarray(group[index], dtype=np.float32) for index in sorted(group, key=int)]
                for name, group in file["data"].items()
            }
    except Exception as error:  # h5py raises all kinds on damaged files
        raise ValueError(f"{path} is an HDF5 file, but not a Caffe model, or it is damaged: {error}") from error


def _read_protobuf(path: str | os.PathLike) -> dict[str, list[np.ndarray]]:
    """Read a binary NetParameter, with layers of the current or of the legacy (V1) type."""
    try:
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ImportError(f"{path} is not HDF5; a binary model needs the package protobuf. {_INSTALL}") from error
    net = _net_parameter()()
    try:
        with open(path, "rb") as file:
            net.ParseFromString(file.read())
    except DecodeError as error:
        raise ValueError(f"{path} is neither HDF5 nor a binary .caffemodel, or it is damaged: {error}") from error
    layers = [*net.layer, *net.layers]
    return {x.name: [_read_blob(blob, f"{path}: layer {x.name}") for blob in x.blobs] for x in layers}


def _read_blob(blob, where: str) -> np.ndarray:
    """Return a BlobProto as float32 array."""
    shape = list(blob.shape.dim) if blob.HasField("shape") else [blob.num, blob.channels, blob.height, blob.width]
    chunks, dtype = (blob.data, "<f4") if blob.data else (blob.double_data, "<f8")
    values = np.frombuffer(b"".join(chunks), dtype=dtype).astype(np.float32)
    if values.size != np.prod(shape):
        raise ValueError(f"{where} has {values.size} values for a parameter of shape {tuple(shape)}.")
    return values.reshape(shape)


def _net_parameter() -> type:
    """Make the message class NetParameter, with the fields of caffe.proto that hold parameters.

    Numbers in a packed field are one run of bytes, and are declared as such: a tensor is then read at once, not number
    by number.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    messages = {  # name: (field, number, type or message, repeated)
        "BlobShape": [("dim", 1, kinds.TYPE_INT64, True)],
        "BlobProto": [
            ("num", 1, kinds.TYPE_INT32, False),
            ("channels", 2, kinds.TYPE_INT32, False),
            ("height", 3, kinds.TYPE_INT32, False),
            ("width", 4, kinds.TYPE_INT32, False),
            ("data", 5, kinds.TYPE_BYTES, True),  # packed float
            ("shape", 7, "BlobShape", False),
            ("double_data", 8, kinds.TYPE_BYTES, True),  # packed double
        ],
        "LayerParameter": [("name", 1, kinds.TYPE_STRING, False), ("blobs", 7, "BlobProto", True)],
        "V1LayerParameter": [("name", 4, kinds.TYPE_STRING, False), ("blobs", 6, "BlobProto", True)],
        "NetParameter": [
            ("name", 1, kinds.TYPE_STRING, False),
            ("layers", 2, "V1LayerParameter", True),
            ("layer", 100, "LayerParameter", True),
        ],
    }
    file = descriptor_pb2.FileDescriptorProto(name="mnc_d2/caffe.proto", package="mnc_d2.caffe", syntax="proto2")
    for message, fields in messages.items():
        declared = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            field = declared.field.add(
                name=name, number=number, label=kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            )
            if isinstance(kind, str):
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{file.package}.{kind}"
            else:
                field.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.NetParameter"))
