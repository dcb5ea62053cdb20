// SPDX-License-Identifier: Apache-2.0
#include "walk/paths.h"

#include "cpython/code.h"

namespace optree {
namespace {

void check_depth(std::size_t levels) {
    if (OPTREE_UNLIKELY(levels > static_cast<std::size_t>(compat::kMaxDepth))) {
        raise(PyExc_RecursionError, "Maximum recursion depth exceeded during walking the tree.");
    }
}

// The functions that create an instance of a class, each with its code, as a tuple.
Ref making_functions(PyObject* cls) {
    ObjectStack functions;
    for (const char* name : {"__new__", "__init__", "__post_init__"}) {
        Ref function =
            Ref::steal(calling_python([&] { return PyObject_GetAttrString(cls, name); }));
        if (!function) {
            if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw PythonError{};
            PyErr_Clear();
            function = Ref::borrow(Py_None);
        }
        PyObject* code = PyFunction_Check(function.get()) ? code_of(function.get()) : Py_None;
        functions.push(function.get());
        functions.push(code);
    }
    return functions.into_tuple();
}

// Whether the class is one of the library's own and still creates instances in the original way.
bool is_stock(const State& state, PyObject* cls) {
    const Ref stock = Ref::borrow(state.stock.get());
    const Ref known = stock ? item_of(stock.get(), cls) : Ref();
    if (!known) return false;
    const Ref functions = making_functions(cls);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(known.get()); ++i) {
        if (PyTuple_GET_ITEM(functions.get(), i) != PyTuple_GET_ITEM(known.get(), i)) return false;
    }
    return calls_plainly(Py_TYPE(cls));
}

// An entry: the class called with the three arguments that follow args[0].
Ref called(PyObject* cls, PyObject** args) {
    return checked(calling_python([&] {
        return PyObject_Vectorcall(cls, args + 1, 3 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
    }));
}

// One of the library's own path entry classes. Its instances are created without running the
// dataclass constructor, whose checks always pass here (makes accessors 10x faster,
// benchmarks/optree). This is done only while none of its functions is replaced.
class StockEntryClass {
  public:
    void load(State& state, const char* name) {
        if (cls_) return;
        cls_ = state.accessor_class(name);
        direct_ = is_stock(state, cls_.get()) && type()->tp_new == PyBaseObject_Type.tp_new &&
                  offset_of("entry", entry_) && offset_of("type", type_) &&
                  offset_of("kind", kind_);
    }

    Ref make(PyObject* entry, PyObject* type_object, PyObject* kind) const {
        if (!direct_) {
            PyObject* args[] = {nullptr, entry, type_object, kind};
            return called(cls_.get(), args);
        }
        Ref made = checked(type()->tp_alloc(type(), 0));
        field(made, entry_) = compat::new_ref(entry);
        field(made, type_) = compat::new_ref(type_object);
        field(made, kind_) = compat::new_ref(kind);
        return made;
    }

  private:
    PyTypeObject* type() const noexcept { return reinterpret_cast<PyTypeObject*>(cls_.get()); }
    static PyObject*& field(const Ref& object, Py_ssize_t offset) noexcept {
        return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object.get()) + offset);
    }
    // Finds the offset of the slot `name` in an instance.
    bool offset_of(const char* name, Py_ssize_t& offset) const {
        const Ref slot = attribute_of(cls_.get(), name);
        offset = offset_of_slot(slot.get());
        return offset >= 0;
    }

    Ref cls_;
    bool direct_ = false;
    Py_ssize_t entry_ = 0;
    Py_ssize_t type_ = 0;
    Py_ssize_t kind_ = 0;
};

// Creates the path entry objects of accessors, and the accessors.
class EntryMaker {
  public:
    explicit EntryMaker(State& state)
        : state_(state), accessor_(state.accessor_class("PyTreeAccessor")) {
        auto* type = reinterpret_cast<PyTypeObject*>(accessor_.get());
        plain_tuple_ = is_stock(state, accessor_.get()) &&
                       type->tp_init == PyBaseObject_Type.tp_init &&
                       type->tp_basicsize == PyTuple_Type.tp_basicsize &&
                       type->tp_alloc == PyType_GenericAlloc;
    }

    Ref entry(Kind kind, const Slot* slots, PyObject* key) {
        PyObject* type = node_type(state_, kind, slots);
        PyObject* kind_object = state_.kinds[static_cast<int>(kind)].get();
        const Registration* registration = registration_of(kind, slots);
        if (registration == nullptr) {
            StockEntryClass& stock = stock_[static_cast<int>(kind)];
            stock.load(state_, entry_class(kind));
            return stock.make(key, type, kind_object);
        }
        plain_tuple_ = false;  // a user's class may return anything: the accessor must check it
        PyObject* args[] = {nullptr, key, type, kind_object};
        return called(registration->path_entry_type, args);
    }

    Ref accessor(ObjectStack& edges) const {
        if (!plain_tuple_) {
            const Ref path = tuple_of(edges.data(), edges.size());
            return checked(
                calling_python([&] { return PyObject_CallOneArg(accessor_.get(), path.get()); }));
        }
        auto* type = reinterpret_cast<PyTypeObject*>(accessor_.get());
        ObjectStack items;
        items.push_all(edges.data(), edges.size());
        Ref made = checked(new_plain_tuple(type, items.data(), items.size()));
        items.forget_from(0);
        return made;
    }

  private:
    State& state_;
    Ref accessor_;
    bool plain_tuple_ = false;
    StockEntryClass stock_[kNumKinds];
};

// Visits the leaves from last to first, which reads each node once and needs no table of children.
// edge(kind, slots, entry) returns the object for the step to the child with this entry.
// leaf(position, edges) is called with the edges that lead to a leaf and removes the last one.
template <class Edge, class Leaf>
void walk_edges(const Tree& tree, Edge&& edge, Leaf&& leaf) {
    // A node that is being visited.
    struct Level {
        Kind kind;
        std::uint32_t children;  // number of children left
        const Slot* slots;
        PyObject* const* keys;  // of a mapping
    };
    ObjectStack edges;
    Scratch<Level, 32> levels;
    Cursor cursor = Cursor::end_of(tree);
    const auto enter = [&](const Node& node) {
        check_depth(levels.size());
        const Slot* slots = slots_of(tree, node);
        const KeyLayout* layout = keys_of(node.kind, slots);
        levels.push({node.kind, node.arity, slots, layout != nullptr ? layout->keys : nullptr});
        cursor.enter();
    };
    if (tree.nodes.empty()) return leaf(0, edges);
    enter(tree.root());
    while (levels.size() != 0) {
        Level& level = levels[levels.size() - 1];
        if (level.children == 0) {
            levels.pop();
            if (levels.size() != 0) edges.drop_from(edges.size() - 1);
            continue;
        }
        const std::uint32_t index = --level.children;
        const Node* node = cursor.node();
        if (node != nullptr && node->leaves == 0) {
            cursor.skip();  // leads to no leaf
            continue;
        }
        Ref entry = level.keys != nullptr ? Ref::borrow(level.keys[index])
                                          : node_entry(level.kind, level.slots, index);
        edges.push_owned(edge(level.kind, level.slots, std::move(entry)).release());
        if (node != nullptr) {
            enter(*node);
        } else {
            check_depth(levels.size());
            cursor.leaf();
            leaf(cursor.leaf_end, edges);
        }
    }
}

// The edges as a tuple, which takes over the last one.
PyObject* new_path(ObjectStack& edges) {
    const std::size_t size = edges.size();
    PyObject* path = checked(PyTuple_New(static_cast<Py_ssize_t>(size))).release();
    if (size == 0) return path;
    PyObject** items = tuple_items(path);
    items[size - 1] = edges.pop();
    for (std::size_t i = 0; i < size - 1; ++i) items[i] = compat::new_ref(edges[i]);
    return path;
}

}  // namespace

void set_stock_classes(State& state, PyObject* classes) {
    if (!PyTuple_CheckExact(classes)) {
        raise(PyExc_TypeError, "expected a tuple of classes, got %R", classes);
    }
    Ref stock = checked(PyDict_New());
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(classes); ++i) {
        PyObject* cls = PyTuple_GET_ITEM(classes, i);
        if (!PyType_Check(cls)) raise(PyExc_TypeError, "expected a class, got %R", cls);
        set_item(stock.get(), cls, making_functions(cls).get());
    }
    state.stock = std::move(stock);
}

Ref spec_paths(const SpecObject& spec) {
    ObjectStack paths;
    paths.extend(spec.tree.leaves);
    walk_edges(
        spec.tree, [](Kind, const Slot*, Ref entry) { return entry; },
        [&](std::uint32_t leaf, ObjectStack& edges) { paths[leaf] = new_path(edges); });
    return paths.into_list();
}

Ref spec_accessors(const SpecObject& spec) {
    EntryMaker maker(state_of(spec));
    ObjectStack accessors;
    accessors.extend(spec.tree.leaves);
    walk_edges(
        spec.tree,
        [&](Kind kind, const Slot* slots, const Ref& entry) {
            return maker.entry(kind, slots, entry.get());
        },
        [&](std::uint32_t leaf, ObjectStack& edges) {
            accessors[leaf] = maker.accessor(edges).release();
            if (edges.size() != 0) edges.drop_from(edges.size() - 1);
        });
    return accessors.into_list();
}

Ref spec_entry(const SpecObject& spec, Py_ssize_t index) {
    const auto arity = static_cast<Py_ssize_t>(spec.tree.num_children());
    if (index < -arity || index >= arity) {
        raise(PyExc_IndexError, "PyTreeSpec::Entry() index out of range.");
    }
    const Node& root = spec.tree.root();
    return node_entry(root.kind, slots_of(spec.tree, root),
                      static_cast<std::uint32_t>(index < 0 ? index + arity : index));
}

Ref spec_entries(const SpecObject& spec) {
    ObjectStack entries;
    const auto arity = static_cast<Py_ssize_t>(spec.tree.num_children());
    for (Py_ssize_t i = 0; i < arity; ++i) entries.push_owned(spec_entry(spec, i).release());
    return entries.into_list();
}

}  // namespace optree
