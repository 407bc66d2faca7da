"""Requests as bytes, for a model of inputs x [rows, 4] FP32 and n [rows] INT64, which returns them."""

from __future__ import annotations

import json
import struct

X, N = struct.pack("<4f", 1, 2, 3, 4), struct.pack("<q", 7)
PATH = "/v2/models/m/infer"
BINARY = json.dumps(
    {
        "id": "a",
        "inputs": [
            {"name": "n", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": 8}},
            {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}},
        ],
        "parameters": {"binary_data_output": True, "timeout": 1000, "priority": 3},
    }
).encode()
JSON = json.dumps(
    {
        "inputs": [
            {"name": "n", "shape": [2], "datatype": "INT64", "data": [1, 2]},
            {"name": "x", "shape": [2, 4], "datatype": "FP32", "data": [[1, 2, 3, 4], [5, 6, 7, 8]]},
        ]
    }
).encode()
HEADER = f"Inference-Header-Content-Length: {len(BINARY)}"


def post(body, *headers, path=PATH):
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *headers, "\r\n"]).encode() + body


def get(path, *headers, method="GET", version="1.1"):
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: x", *headers, "\r\n"]).encode()


def sized(body, *headers, path=PATH):
    return post(body, f"Content-Length: {len(body)}", *headers, path=path)


def chunked(body, size, *headers):
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    data = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return post(data, "Transfer-Encoding: chunked", *headers)


def binary():
    return sized(BINARY + N + X, HEADER)
