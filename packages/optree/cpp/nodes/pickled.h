// SPDX-License-Identifier: Apache-2.0
// A node in the form between a spec and its pickle.
#pragma once

#include "support/errors.h"
#include "support/object_stack.h"

namespace optree {

struct State;

// The parts of a node's slots that are written; null stands for None.
struct WrittenNode {
    Ref data;
    Ref entries;
    Ref type;
    Ref original;     // the keys in insertion order
    bool for_pickle;  // false: for __getstate__()
};

// The source of a node that is read, and the objects read from it so far. The content is untrusted.
struct ReadNode {
    State& state;
    PyObject* name;  // the namespace
    bool none_is_leaf;
    const char* kind;  // its name in messages
    Py_ssize_t arity;
    PyObject* data;  // a slot that finds several values here takes its own and leaves the rest
    PyObject* entries;
    PyObject* type;
    PyObject* original;  // null in pickles from versions that did not store it
    Ref owner;           // keeps the rest of `data` alive
};

// Raises "Malformed pickled PyTreeSpec: ...".
[[noreturn]] OPTREE_COLD void malformed(const char* format, ...);
// An int in the valid range; `what` begins the message.
Py_ssize_t read_integer(PyObject* value, const char* what);
inline void require_none(PyObject* value, const char* what) {
    if (value != Py_None) malformed("%s", what);
}
inline bool is_sequence(PyObject* value) noexcept {
    return PyList_Check(value) || PyTuple_Check(value);
}

// The layout of the keys in `node.data`. The insertion order is `node.original`, or else the same.
Ref read_keys(ReadNode& node, bool with_original);
// The keys of a layout in insertion order, in the form for pickle. `keys` are those in traversal
// order.
Ref written_original(struct KeyLayout* layout, PyObject* keys, bool for_pickle);

}  // namespace optree
