"""Every message of the wire with every field set; `python -m tests.support.wire` keeps them.

The file holds what the first release sends. It is written once per release and never changed:
a later release reads these bytes as they were meant.
"""

import json
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from flplatform.rpc.v1 import federated_pb2 as pb

GOLDEN = Path(__file__).parents[1] / "golden" / "wire-0.1.json"
UNKNOWN = b"\xc2\x3e\x14from a later release"
"""Field 1000, a text."""


def messages() -> list[type[Message]]:
    """Return the classes of all messages, by name."""
    names = sorted(pb.DESCRIPTOR.message_types_by_name)
    return [getattr(pb, name) for name in names]


def filled(kind: type[Message]) -> Message:
    """Return a message whose every field says something; of alternatives the last is set."""
    message = kind()
    _fill(message, kind.DESCRIPTOR)
    return message


def _fill(message: Any, descriptor: Descriptor) -> None:
    for field in descriptor.fields:
        value = getattr(message, field.name)
        if field.message_type and field.message_type.GetOptions().map_entry:
            value[f"key of {field.name}"] = field.number + 0.5
        elif field.message_type and field.is_repeated:
            _fill(value.add(), field.message_type)
        elif field.message_type:
            _fill(value, field.message_type)
            value.SetInParent()
        elif field.is_repeated:
            value.append(_plain(field))
        else:
            setattr(message, field.name, _plain(field))


def _plain(field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return field.number + 0.25
        case FieldDescriptor.CPPTYPE_BOOL:
            return True
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return field.name.encode()
        case FieldDescriptor.CPPTYPE_STRING:
            return f"the {field.name}"
        case _:
            return 1000 + field.number


def said(message: Message) -> dict[str, Any]:
    """Return what a message says, by names of fields."""
    return MessageToDict(message, preserving_proto_field_name=True)


def newer(message: Any) -> Any:
    """Have a message say more than this release knows, in every part of it; return it."""
    for field, value in message.ListFields():
        if field.message_type and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else [value]:
                newer(part)
    message.MergeFromString(UNKNOWN)
    return message


def main() -> None:
    """Write the file."""
    lines = {
        kind.DESCRIPTOR.name: {
            "bytes": filled(kind).SerializeToString(deterministic=True).hex(),
            "says": said(filled(kind)),
        }
        for kind in messages()
    }
    GOLDEN.write_text(json.dumps(lines, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
