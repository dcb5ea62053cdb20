// SPDX-License-Identifier: Apache-2.0
// A node between a spec and its pickle.
#pragma once

#include "support/errors.h"
#include "support/object_stack.h"

namespace optree {

struct State;

// The parts of the slots of a node that are written; null stands for None.
struct WrittenNode {
    Ref data;
    Ref entries;
    Ref type;
    Ref original;     // the keys in insertion order
    bool for_pickle;  // else for __getstate__()
};

// What a node is read from, and what it is read into. The content is untrusted.
struct ReadNode {
    State& state;
    PyObject* name;  // the namespace
    bool none_is_leaf;
    const char* kind;  // its name in messages
    Py_ssize_t arity;
    PyObject* data;  // a slot that finds several things in it takes its own, and leaves the others
    PyObject* entries;
    PyObject* type;
    PyObject* original;  // null in pickles of before there was one
    Ref owner;           // of what was left of `data`
};

// Raises "Malformed pickled PyTreeSpec: ...".
[[noreturn]] OPTREE_COLD void malformed(const char* format, ...);
// An int that fits; `what` begins the message.
Py_ssize_t read_integer(PyObject* value, const char* what);
inline void require_none(PyObject* value, const char* what) {
    if (value != Py_None) malformed("%s", what);
}
inline bool is_sequence(PyObject* value) noexcept {
    return PyList_Check(value) || PyTuple_Check(value);
}

// The layout of the keys in `node.data`; with the insertion order in `node.original`, or the same.
Ref read_keys(ReadNode& node, bool with_original);
// The keys of a layout in insertion order, as a pickle has them; `keys` are those in traversal order.
Ref written_original(struct KeyLayout* layout, PyObject* keys, bool for_pickle);

}  // namespace optree
