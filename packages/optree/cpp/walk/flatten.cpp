// SPDX-License-Identifier: Apache-2.0
#include "walk/flatten.h"

#include <algorithm>
#include <cstring>

#include "nodes/look_ahead.h"

namespace optree {
namespace {

[[noreturn]] OPTREE_COLD void raise_too_deep() {
    raise(PyExc_RecursionError, "Maximum recursion depth exceeded during flattening the tree.");
}

[[noreturn]] OPTREE_COLD void raise_shrunk() { raise(PyExc_IndexError, "list index out of range"); }

OPTREE_INLINE void check_depth(int depth, std::size_t arity) {
    if (OPTREE_UNLIKELY(depth >= compat::kMaxDepth && arity != 0)) raise_too_deep();
}

}  // namespace

// The slots of the node must have been pushed.
OPTREE_INLINE void Flattening::close(Kind kind, std::uint32_t arity, Start start,
                                     std::size_t slots) {
    nodes_.push({kind,
                 {},
                 static_cast<std::uint32_t>(slots_.size() - slots),
                 arity,
                 static_cast<std::uint32_t>(count_ - start.leaf),
                 static_cast<std::uint32_t>(nodes_.size() - start.node + 1),
                 static_cast<std::uint32_t>(count_)});
}

template <bool kPredicate, bool kKeep>
OPTREE_INLINE void Flattening::visit(PyObject* object, int depth) {
    if constexpr (kPredicate) {
        if (context_.is_leaf_by_predicate(object)) return add_leaf<kKeep>(object);
    }
    Registration* registration = nullptr;
    const Kind kind = context_.classify(object, registration);
    if (OPTREE_LIKELY(kind == Kind::leaf)) return add_leaf<kKeep>(object);
    descend<kPredicate, kKeep>(kind, registration, object, depth);
}

template <bool kPredicate, bool kKeep>
OPTREE_INLINE void Flattening::visit_owned_children(std::size_t base, std::uint32_t arity,
                                                    int depth) {
    // The references in pending_[base, base + arity) are handed on to the leaves one by one.
    for (std::size_t i = base; i < base + arity; ++i) {
        PyObject* child = pending_[i];
        Registration* registration = nullptr;
        const bool stop = kPredicate && context_.is_leaf_by_predicate(child);
        const Kind kind = stop ? Kind::leaf : context_.classify(child, registration);
        if (OPTREE_LIKELY(kind == Kind::leaf)) {
            if constexpr (kKeep) {
                pending_[i] = nullptr;
                leaves.push_owned(child);
            }
            ++count_;
        } else {
            descend<kPredicate, kKeep>(kind, registration, child, depth);
        }
    }
    pending_.drop_from(base);
}

template <bool kPredicate, bool kKeep>
OPTREE_NOINLINE void Flattening::descend_list(PyObject* list, int depth) {
    const Start begin = start();
    const Py_ssize_t size = PyList_GET_SIZE(list);
    const std::uint32_t arity = checked_count(static_cast<std::size_t>(size));
    check_depth(depth, arity);
    if constexpr (kKeep) leaves.reserve(arity);
    for (Py_ssize_t i = 0; i < size; ++i) {
        if constexpr (!compat::kFreeThreaded) {
            // User code may have shrunk the list.
            if (OPTREE_UNLIKELY(i >= PyList_GET_SIZE(list))) raise_shrunk();
            if constexpr (!kPredicate) {
                if (Py_TYPE(list_items(list)[i]) == context_.last_leaf()) {
                    const Py_ssize_t there = std::min(size, PyList_GET_SIZE(list));
                    i += static_cast<Py_ssize_t>(add_leaves_alike<kKeep>(
                        list_items(list) + i, static_cast<std::size_t>(there - i)));
                    if (i == size) break;
                    if (OPTREE_UNLIKELY(i == there)) raise_shrunk();
                }
            }
        }
        // Telling the kind may run Python code too (a metaclass): the reference is taken first.
        Ref child = compat::kFreeThreaded ? checked(compat::list_item(list, i))
                                          : Ref::borrow(PyList_GET_ITEM(list, i));
        if constexpr (kPredicate) {
            visit<kPredicate, kKeep>(child.get(), depth + 1);
        } else {
            Registration* found = nullptr;
            const Kind kind = context_.classify(child.get(), found);
            if (OPTREE_LIKELY(kind == Kind::leaf)) {
                if constexpr (kKeep) leaves.push_owned(child.release());
                ++count_;
            } else {
                descend<kPredicate, kKeep>(kind, found, child.get(), depth + 1);
            }
        }
    }
    close(Kind::list, arity, begin, 0);
}

template <bool kPredicate, bool kKeep>
OPTREE_NOINLINE void Flattening::descend_tuple(Kind kind, PyObject* tuple, int depth) {
    const Start begin = start();
    const std::uint32_t arity = checked_count(static_cast<std::size_t>(PyTuple_GET_SIZE(tuple)));
    check_depth(depth, arity);
    // The caller keeps the tuple alive, and the tuple its class and items.
    PyObject* const* items = tuple_items(tuple);
    const bool has_class = kind != Kind::tuple;
    // Kept among the pending objects, whose owner a failure cleans up.
    if (has_class) pending_.push(type_object(Py_TYPE(tuple)));
    if constexpr (kKeep) leaves.reserve(arity);
    if (!kPredicate && context_.are_like_last_leaf(items, arity)) {
        add_leaves<kKeep>(items, arity);
    } else {
        for (std::uint32_t i = 0; i < arity; ++i) visit<kPredicate, kKeep>(items[i], depth + 1);
    }
    if (has_class) {
        slots_.push(pending_[pending_.size() - 1]);
        (void)pending_.pop();
    }
    close(kind, arity, begin, has_class ? 1 : 0);
}

template <bool kPredicate, bool kKeep, class Mapping>
OPTREE_NOINLINE void Flattening::descend_mapping(Kind kind, PyObject* mapping, int depth) {
    const Start begin = start();
    const std::size_t base = pending_.size();
    std::uint32_t arity = 0;
    Ref layout;
    {
        const CriticalSection reading(mapping);  // while values are borrowed
        // `descend` has asked already; only another thread may have emptied it since.
        if (compat::kFreeThreaded && Mapping::is_empty(context_.state, mapping)) {
            slots_.push(compat::new_ref(context_.state.layouts().empty.get()));
            return close(kind, 0, begin, 1);
        }
        const auto size = static_cast<std::size_t>(PyDict_GET_SIZE(mapping));
        arity = checked_count(size);
        check_depth(depth, arity);
        pending_.reserve(size);
        PyObject** values = pending_.data() + base;
        if (KeyLayout* known = Mapping::gather_known(context_, mapping, values)) {
            if constexpr (!kPredicate) {
                if (context_.are_like_last_leaf(values, size) ||
                    (context_.is_first_leaf(values[0]) &&
                     context_.are_like_last_leaf(values, size))) {
                    add_leaves<kKeep>(values, size);
                    slots_.push(compat::new_ref(reinterpret_cast<PyObject*>(known)));
                    return close(kind, arity, begin, 1);
                }
            }
            take_references(values, size);
            pending_.adopt(size);
            layout = Ref::borrow(reinterpret_cast<PyObject*>(known));
        }
    }
    if (!layout) {
        layout = Mapping::scan_unknown(context_, mapping, pending_);
        arity = as_layout(layout.get())->size;
    }
    visit_owned_children<kPredicate, kKeep>(base, arity, depth + 1);
    push_slot(std::move(layout));
    close(kind, arity, begin, 1);
}

template <bool kPredicate, bool kKeep>
OPTREE_NOINLINE void Flattening::descend_any(Kind kind, Registration* registration,
                                             PyObject* object, int depth) {
    const Start begin = start();
    const std::size_t base = pending_.size();
    Payload payload;
    const std::uint32_t arity = expand(context_, kind, registration, object, pending_, payload);
    check_depth(depth, arity);
    found_custom_ = found_custom_ || kind == Kind::custom;
    visit_owned_children<kPredicate, kKeep>(base, arity, depth + 1);
    const std::size_t slots = slot_count(kind);
    for (std::size_t i = 0; i < slots; ++i) push_slot(std::move(payload.slot[i]));
    close(kind, arity, begin, slots);
}

// Empty containers need no frame of their own: an eighth of the nodes of ResNet50's module tree.
OPTREE_NOINLINE void Flattening::add_empty(Kind kind) {
    const bool mapping = kind == Kind::dict || kind == Kind::ordereddict;
    if (mapping) slots_.push(compat::new_ref(context_.state.layouts().empty.get()));
    close(kind, 0, start(), mapping ? 1 : 0);
}

template <bool kPredicate, bool kKeep>
OPTREE_INLINE void Flattening::descend(Kind kind, Registration* registration, PyObject* object,
                                       int depth) {
    switch (kind) {
        case Kind::none: return add_empty(kind);
        case Kind::list:
            if (PyList_GET_SIZE(object) == 0) return add_empty(kind);
            return descend_list<kPredicate, kKeep>(object, depth);
        case Kind::tuple:
            if (PyTuple_GET_SIZE(object) == 0) return add_empty(kind);
            [[fallthrough]];
        case Kind::namedtuple:
        case Kind::structseq: return descend_tuple<kPredicate, kKeep>(kind, object, depth);
        case Kind::dict:
            if (Dict::is_empty(context_.state, object)) return add_empty(kind);
            return descend_mapping<kPredicate, kKeep, Dict>(kind, object, depth);
        case Kind::ordereddict:
            if (OrderedDict::is_empty(context_.state, object)) return add_empty(kind);
            return descend_mapping<kPredicate, kKeep, OrderedDict>(kind, object, depth);
        default: return descend_any<kPredicate, kKeep>(kind, registration, object, depth);
    }
}

void Flattening::run(PyObject* tree, bool keep_leaves) {
    const Ref alive = Ref::borrow(tree);
    if (context_.predicate != nullptr) {
        keep_leaves ? visit<true, true>(tree, 0) : visit<true, false>(tree, 0);
    } else {
        keep_leaves ? visit<false, true>(tree, 0) : visit<false, false>(tree, 0);
    }
    checked_count(count_);
    checked_count(nodes_.size());
}

Ref Flattening::take_spec() {
    Ref self =
        new_spec(context_.state, context_.none_is_leaf, context_.spec_namespace(found_custom_));
    Tree& tree = as_spec(self.get()).tree;
    // All the memory first: a spec owns all of its slots or none.
    tree.slots.reserve(slots_.size());
    tree.nodes.resize(nodes_.size());
    tree.slots.resize(slots_.size());
    std::memcpy(static_cast<void*>(tree.nodes.data()), nodes_.data(), nodes_.size() * sizeof(Node));
    std::memcpy(static_cast<void*>(tree.slots.data()), slots_.data(), slots_.size() * sizeof(Slot));
    tree.leaves = static_cast<std::uint32_t>(count_);
    slots_.set_size(0);  // the spec owns them now
    return self;
}

Ref flatten_to_pair(Context& context, PyObject* tree) {
    Flattening flat(context);
    flat.run(tree);
    Ref spec = flat.take_spec();
    Ref leaves = flat.leaves.into_list();
    Ref pair = checked(PyTuple_New(2));
    PyTuple_SET_ITEM(pair.get(), 0, leaves.release());
    PyTuple_SET_ITEM(pair.get(), 1, spec.release());
    return pair;
}

Ref flatten_to_leaves(Context& context, PyObject* tree) {
    Flattening flat(context);
    flat.run(tree);
    return flat.leaves.into_list();
}

Ref flatten_to_spec(Context& context, PyObject* tree) {
    Flattening flat(context);
    flat.run(tree, false);
    return flat.take_spec();
}

}  // namespace optree
