// SPDX-License-Identifier: Apache-2.0
#include "walk/transform.h"

#include "nodes/sequence.h"
#include "walk/compose.h"
#include "walk/unflatten.h"

namespace optree {
namespace {

// Calls the functions of a transform and checks their results.
class Transformer {
  public:
    Transformer(const SpecObject& spec, PyObject* f_node, PyObject* f_leaf)
        : spec_(spec),
          state_(state_of(spec)),
          f_node_(f_node),
          f_leaf_(f_leaf),
          name_(Ref::borrow(spec.name)) {}

    Ref run() {
        TreeOwner owner;
        Builder build(owner.tree);
        visit_tokens(
            spec_.tree, [&] { leaf(build); },
            [&](const Node& node) {
                if (f_node_ != nullptr) return close(owner.tree, build, node);
                share_payload(owner.tree, node.kind, slots_of(spec_.tree, node));
                build.close(node.kind, node.arity);
            });
        return new_spec(state_, spec_.none_is_leaf, name_.get(), owner);
    }

  private:
    void leaf(Builder& build) {
        if (f_leaf_ == nullptr) return build.leaf();
        const Ref input = new_leaf_spec(state_, spec_.none_is_leaf, spec_.name);
        const Ref result = call(f_leaf_, input.get());
        const SpecObject& made = as_spec(result.get());
        build.append(made.tree, whole(made.tree), share_slot);
    }

    void close(Tree& out, Builder& build, const Node& node) {
        const Ref input = spec_of_node(spec_, node);
        const Ref result = call(f_node_, input.get());
        const Tree& made = as_spec(result.get()).tree;
        if (made.leaves != node.arity) {
            raise(PyExc_ValueError,
                  "Expected the PyTreeSpec transform function returns a PyTreeSpec with the same "
                  "number of arity as the input (%zd), got %R (input: %R).",
                  static_cast<Py_ssize_t>(node.arity), result.get(), input.get());
        }
        if (made.nodes.empty() || made.num_children() != node.arity ||
            made.num_nodes() != std::uint64_t{node.arity} + 1) {
            raise(
                PyExc_ValueError,
                "Expected the PyTreeSpec transform function returns a one-level PyTreeSpec as the "
                "input, got %R (input: %R).",
                result.get(), input.get());
        }
        share_payload(out, made.root().kind, slots_of(made, made.root()));
        build.close(made.root().kind, node.arity);
    }

    Ref call(PyObject* function, PyObject* input) {
        Ref result = checked(calling_python([&] { return PyObject_CallOneArg(function, input); }));
        if (!is_spec(state_, result.get())) {
            raise(PyExc_TypeError,
                  "Expected the PyTreeSpec transform function returns a PyTreeSpec, got %R (input: "
                  "%R).",
                  result.get(), input);
        }
        const SpecObject& made = as_spec(result.get());
        require_initialised(made);
        if (made.none_is_leaf != spec_.none_is_leaf) {
            raise(PyExc_ValueError,
                  "Expected the PyTreeSpec transform function returns a PyTreeSpec with the same "
                  "value of `none_is_leaf=%s` as the input, got %R (input: %R).",
                  spec_.none_is_leaf ? "True" : "False", result.get(), input);
        }
        if (!is_empty_str(made.name)) {
            if (is_empty_str(name_.get())) {
                require_same_registrations(spec_, made.name, "PyTreeSpecs cannot be transformed");
                name_ = Ref::borrow(made.name);
            } else if (!same_text(name_.get(), made.name)) {
                raise(PyExc_ValueError,
                      "Expected the PyTreeSpec transform function returns a PyTreeSpec with "
                      "namespace %R, got %R.",
                      name_.get(), made.name);
            }
        } else if (!is_empty_str(name_.get())) {
            require_same_registrations(made, name_.get(), "PyTreeSpecs cannot be transformed");
        }
        return result;
    }

    const SpecObject& spec_;
    State& state_;
    PyObject* f_node_;
    PyObject* f_leaf_;
    Ref name_;
};

template <class Close>
Ref rebuild_with(const SpecObject& spec, PyObject* leaves, PyObject* f_leaf, Close&& close) {
    const Ref iterator = checked(PyObject_GetIter(leaves));
    IteratorSource source(state_of(spec), iterator.get(), spec.tree.leaves, false);
    ObjectStack stack;
    const auto leaf = [&] {
        Ref value = source.next();
        if (f_leaf != nullptr)
            value =
                checked(calling_python([&] { return PyObject_CallOneArg(f_leaf, value.get()); }));
        stack.push_owned(value.release());
    };
    visit_tokens(spec.tree, leaf, [&](const Node& node) {
        const std::size_t base = stack.size() - node.arity;
        Ref made = close(node, stack, base);
        stack.push_owned(made.release());
    });
    source.finish();
    return Ref::steal(stack.pop());
}

}  // namespace

Ref spec_transform(const SpecObject& spec, PyObject* f_node, PyObject* f_leaf) {
    return Transformer(spec, f_node, f_leaf).run();
}

Ref spec_traverse_leaves(const SpecObject& spec, PyObject* leaves, PyObject* f_node,
                         PyObject* f_leaf) {
    State& state = state_of(spec);
    return rebuild_with(
        spec, leaves, f_leaf, [&](const Node& node, ObjectStack& stack, std::size_t base) {
            PyObject* made = rebuild(state, node.kind, slots_of(spec.tree, node),
                                     stack.data() + base, node.arity);
            stack.forget_from(base);
            Ref container = checked(made);
            if (f_node == nullptr) return container;
            return checked(
                calling_python([&] { return PyObject_CallOneArg(f_node, container.get()); }));
        });
}

Ref spec_walk(const SpecObject& spec, PyObject* leaves, PyObject* f_node, PyObject* f_leaf) {
    if (f_node == nullptr) return spec_traverse_leaves(spec, leaves, nullptr, f_leaf);
    State& state = state_of(spec);
    return rebuild_with(spec, leaves, f_leaf,
                        [&](const Node& node, ObjectStack& stack, std::size_t base) {
                            PyObject* tuple = steal_into_tuple(stack.data() + base, node.arity);
                            stack.forget_from(base);
                            const Ref children = checked(tuple);
                            const Slot* slots = slots_of(spec.tree, node);
                            const Ref data = node_data(node.kind, slots);
                            PyObject* args[] = {nullptr, node_type(state, node.kind, slots),
                                                data ? data.get() : Py_None, children.get()};
                            return checked(calling_python([&] {
                                return PyObject_Vectorcall(
                                    f_node, args + 1, 3 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
                            }));
                        });
}

}  // namespace optree
