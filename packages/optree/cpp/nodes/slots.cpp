// SPDX-License-Identifier: Apache-2.0
#include "nodes/slots.h"

#include "nodes/context.h"

namespace optree {

std::uint64_t hash_of_object(PyObject* object) {
    const Py_hash_t hash = calling_python([&] { return PyObject_Hash(object); });
    if (hash == -1 && PyErr_Occurred()) throw PythonError{};
    return static_cast<std::uint64_t>(hash);
}

// The hash of keys that are not atomic may change, so it is computed each time.
std::uint64_t hash_of_keys(KeyLayout* layout) {
    if (const std::uint64_t known = layout->hash.load(std::memory_order_relaxed)) return known;
    std::uint64_t hash = layout->size;
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        hash = combine(hash, hash_of_object(layout->keys[i]));
    }
    if (layout->atomic) layout->hash.store(hash, std::memory_order_relaxed);
    return hash;
}

void raise_other_class(const char* kind, Slot a, Slot b) {
    raise(PyExc_ValueError, "%s type mismatch; expected type: %R, got type: %R.", kind,
          as_object(a), as_object(b));
}

void raise_other_metadata(Slot a, Slot b) {
    raise(PyExc_ValueError, "Mismatch custom node data; expected: %R, got: %R.", as_object(a),
          as_object(b));
}

Ref Registered::read(ReadNode& node) {
    PyObject* cls = node.type;
    if (!PyType_Check(cls)) malformed("the custom type of a custom node is not a class");
    if (is_builtin_node(node.state, cls)) malformed("the custom type is a built-in type: %R", cls);
    Registry& registry = node.state.registry;
    Ref found = registry.lookup(registry.find(node.name), reinterpret_cast<PyTypeObject*>(cls));
    if (found) return found;
    if (PyUnicode_GET_LENGTH(node.name) == 0) {
        raise(PyExc_RuntimeError,
              "Unknown custom type in pickled PyTreeSpec: %R in the global namespace.", cls);
    }
    raise(PyExc_RuntimeError, "Unknown custom type in pickled PyTreeSpec: %R in namespace %R.", cls,
          node.name);
}

Ref Entries::read(ReadNode& node) {
    if (node.entries == Py_None) return nullptr;
    if (!is_sequence(node.entries)) malformed("the entries of a custom node are not a tuple");
    Ref entries = collected_tuple(node.entries);
    if (PyTuple_GET_SIZE(entries.get()) != node.arity) {
        malformed("the number of entries does not match the arity");
    }
    return entries;
}

Ref Class::read(ReadNode& node) {
    if (!PyType_Check(node.data)) {
        malformed("the node data of a %s node is not a class", node.kind);
    }
    return Ref::borrow(node.data);
}

Ref Factory::read(ReadNode& node) {
    const auto require_pair = [](bool is_pair) {
        if (!is_pair) malformed("the node data of a defaultdict node is not a pair");
    };
    require_pair(is_sequence(node.data));
    node.owner = collected_tuple(node.data);
    require_pair(PyTuple_GET_SIZE(node.owner.get()) == 2);
    PyObject* factory = PyTuple_GET_ITEM(node.owner.get(), 0);
    if (factory != Py_None && PyCallable_Check(factory) == 0) {
        malformed("the default factory of a defaultdict node is not callable");
    }
    node.data = PyTuple_GET_ITEM(node.owner.get(), 1);
    return Ref::borrow(factory);
}

Ref Maxlen::read(ReadNode& node) {
    if (node.data == Py_None) return nullptr;
    if (read_integer(node.data, "the maxlen of a deque node") < node.arity) {
        malformed("the maxlen of a deque node is less than its arity");
    }
    return Ref::borrow(node.data);
}

}  // namespace optree
