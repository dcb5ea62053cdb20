// SPDX-License-Identifier: Apache-2.0
#include "walk/from_collection.h"

namespace optree {
namespace {

[[noreturn]] OPTREE_COLD void raise_not_specs(State& state, Kind kind, const Slot* slots,
                                              PyObject* got) {
    if (is_named_by_class(kind)) {
        raise(PyExc_ValueError, "Expected a(n) %R of PyTreeSpec(s), got %R.",
              node_type(state, kind, slots), got);
    }
    raise(PyExc_ValueError, "Expected a(n) %s of PyTreeSpec(s), got %R.", kind_name(kind), got);
}

}  // namespace

Ref spec_from_collection(Context& context, PyObject* collection) {
    State& state = context.state;
    PyObject* empty = state.empty_str.get();
    Registration* registration = nullptr;
    const Kind kind = context.classify(collection, registration);
    if (is_leaf(kind)) {
        check_status(calling_python([] {
            return PyErr_WarnEx(PyExc_UserWarning,
                                "PyTreeSpec::MakeFromCollection() is called on a leaf.", 2);
        }));
        return new_leaf_spec(state, context.none_is_leaf, empty);
    }
    ObjectStack children;
    Payload payload;
    const std::uint32_t arity = expand(context, kind, registration, collection, children, payload);

    Ref name = Ref::borrow(empty);
    for (std::size_t i = 0; i < arity; ++i) {
        if (!is_spec(state, children[i])) {
            const Slot slots[] = {payload.slot[0].get(), payload.slot[1].get(),
                                  payload.slot[2].get()};
            raise_not_specs(state, kind, slots, collection);
        }
        const SpecObject& child = as_spec(children[i]);
        require_initialised(child);
        if (child.none_is_leaf != context.none_is_leaf) {
            raise(PyExc_ValueError, "Expected treespec(s) with `none_is_leaf=%s`.",
                  context.none_is_leaf ? "True" : "False");
        }
        if (is_empty_str(child.name)) continue;
        if (is_empty_str(name.get())) {
            name = Ref::borrow(child.name);
        } else if (!same_text(name.get(), child.name)) {
            raise(PyExc_ValueError, "Expected treespecs with the same namespace, got %R vs. %R.",
                  name.get(), child.name);
        }
    }
    constexpr const char* what = "PyTreeSpecs cannot be composed into a collection";
    bool named = !is_empty_str(name.get());
    if (named && !is_empty_str(context.name()) && !same_text(context.name(), name.get())) {
        raise(PyExc_ValueError, "Expected treespec(s) with namespace %R, got %R.", context.name(),
              name.get());
    }
    if (!named &&
        (is_custom(kind) || (context.own_insertion_ordered && facts_of(kind).follows_dict_mode))) {
        name = Ref::borrow(context.name());
        named = true;
    }
    for (std::size_t i = 0; named && i < arity; ++i) {
        const SpecObject& child = as_spec(children[i]);
        if (is_empty_str(child.name)) require_same_registrations(child, name.get(), what);
    }
    if (is_custom(kind) && !is_empty_str(name.get())) {
        // The root was resolved in the namespace of the argument. It must mean the same in that of
        // the result.
        require_same_registration(state, as_registration(payload.slot[0].get()), name.get(), what);
    }
    TreeOwner owner;
    Builder build(owner.tree);
    for (std::size_t i = 0; i < arity; ++i) {
        const Tree& child = as_spec(children[i]).tree;
        build.append(child, whole(child), share_slot);
    }
    push_payload(owner.tree, kind, payload);
    build.close(kind, arity);
    return new_spec(state, context.none_is_leaf, name.get(), owner);
}

}  // namespace optree
