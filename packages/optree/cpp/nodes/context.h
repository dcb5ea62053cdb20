// SPDX-License-Identifier: Apache-2.0
// The options that decide in one call which objects are nodes, and the decision itself.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <iterator>
#include <memory>
#include <utility>

#include "nodes/state.h"
#include "spec/kind.h"
#include "support/object_stack.h"

namespace optree {

// The payload slots of one node, owned until they move into a slot table.
struct Payload {
    Ref slot[3];
};

// Created once per call: resolves the namespace and reads the dict mode once.
class Context {
  public:
    // `predicate` may be null; `name` is an exact str.
    Context(State& state_, PyObject* predicate_, bool none_is_leaf_, PyObject* name)
        : state(state_), predicate(predicate_), none_is_leaf(none_is_leaf_), name_(name) {
        named_ = name == state.empty_str.get() ? nullptr : state.registry.find(name);
        own_insertion_ordered = named_ != nullptr && keeps_insertion_order(*named_);
        sorted = !own_insertion_ordered && !keeps_insertion_order(state.registry.global());
        none_type_ = none_is_leaf ? nullptr : Py_TYPE(Py_None);
    }
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;
    ~Context() { forget(); }

    State& state;
    PyObject* predicate;
    bool none_is_leaf;
    bool sorted;  // dicts are traversed in the order of their sorted keys
    bool
        own_insertion_ordered;  // the namespace itself (not the global one) asks for insertion order

    // The class of the last leaf, borrowed; null before the first leaf.
    OPTREE_INLINE const PyTypeObject* last_leaf() const noexcept { return last_leaf_; }

    // Whether `object` is known to be a leaf: it has the class of the last leaf, or it is the first
    // leaf. Returns false if Python code would have to run to decide.
    OPTREE_INLINE bool is_leaf_for_sure(PyObject* object) {
        if (OPTREE_LIKELY(Py_TYPE(object) == last_leaf_)) return true;
        return !compat::kFreeThreaded && last_leaf_ == nullptr && is_first_leaf(object);
    }

    // The kind of `object` by its exact class. Sets `registration` for Kind::custom; it is borrowed
    // until the next call.
    OPTREE_INLINE Kind classify(PyObject* object, Registration*& registration) {
        PyTypeObject* type = Py_TYPE(object);
        if (OPTREE_LIKELY(type == last_leaf_)) return Kind::leaf;
        if (type == &PyTuple_Type) return Kind::tuple;
        if (type == &PyDict_Type) return Kind::dict;
        if (type == &PyList_Type) return Kind::list;
        if (type == none_type_) return Kind::none;
        if (type == &PyODict_Type) return Kind::ordereddict;
        for (const Seen& seen : seen_[seen_index(type)]) {
            if (seen.type == type) return seen.kind;
        }
        return classify_rest(type, registration);
    }

    // Whether `classify` recognises the class without a table.
    static bool asks_for(PyObject* cls) noexcept {
        for (PyTypeObject* type :
             {&PyTuple_Type, &PyDict_Type, &PyList_Type, Py_TYPE(Py_None), &PyODict_Type}) {
            if (cls == type_object(type)) return true;
        }
        return false;
    }

    // Clears the cached classes. May run Python code.
    OPTREE_INLINE void forget() noexcept {
        last_leaf_ = nullptr;
        while (used_ != 0) {
            const auto set = std::exchange(seen_[std::countr_zero(used_)], SeenSet());
            used_ &= used_ - 1;
            for (const Seen& seen : set) xdrop(reinterpret_cast<PyObject*>(seen.type));
        }
    }

    bool is_leaf_by_predicate(PyObject* object) const {
        const Ref answer =
            checked(calling_python([&] { return PyObject_CallOneArg(predicate, object); }));
        if (answer.get() == Py_True) return true;
        if (answer.get() == Py_False) return false;
        return truth_of(answer.get());
    }

    Ref lookup(PyTypeObject* type) const noexcept { return state.registry.lookup(named_, type); }

    // The namespace that specs made by this call store.
    PyObject* spec_namespace(bool found_custom) const noexcept {
        return found_custom || own_insertion_ordered ? name_ : state.empty_str.get();
    }
    PyObject* name() const noexcept { return name_; }

  private:
    static bool keeps_insertion_order(const Namespace& space) noexcept {
        return space.insertion_ordered.load(std::memory_order_relaxed);
    }

    // Classes seen during this call. They are found by address and therefore kept alive: the tree
    // may drop a class during the walk, and another class may reuse its address. Makes flatten a
    // quarter faster on module trees, where leaves alternate with two namedtuples.
    struct Seen {
        PyTypeObject* type = nullptr;
        Kind kind{};
    };
    // With two entries in a set, two namedtuples and one class of leaves evicted each other in one
    // process out of four. Their addresses differ from run to run.
    using SeenSet = std::array<Seen, 4>;
    static std::size_t seen_index(const PyTypeObject* type) noexcept {
        const auto bits = reinterpret_cast<std::uintptr_t>(type);
        return ((bits >> 4) ^ (bits >> 8) ^ (bits >> 12)) % kSets;
    }

    OPTREE_NOINLINE bool is_first_leaf(PyObject* object) {
        Registration* registration = nullptr;
        return !PyTuple_Check(object) && classify(object, registration) == Kind::leaf;
    }

    OPTREE_NOINLINE Kind classify_rest(PyTypeObject* type, Registration*& registration);

    void remember(PyTypeObject* type, Kind kind) {
        const std::size_t place = seen_index(type);
        SeenSet& set = seen_[place];
        if (set.back().type != nullptr) drop(set.back().type);
        std::copy_backward(set.begin(), set.end() - 1, set.end());
        Py_INCREF(reinterpret_cast<PyObject*>(type));
        set[0] = {type, kind};
        used_ |= 1U << place;
        if (kind == Kind::leaf) last_leaf_ = type;
    }

    // Evicts a class. Destroying it may run Python code, so this is deferred to the end of the
    // call.
    void drop(PyTypeObject* type) {
        PyObject* cls = reinterpret_cast<PyObject*>(type);
        if (last_leaf_ == type) last_leaf_ = nullptr;
        if (compat::kFreeThreaded || Py_REFCNT(cls) > 1) {
            optree::drop(cls);
        } else {
            if (!dropped_) dropped_ = std::make_unique<ObjectStack>();
            dropped_->reserve(1);
            dropped_->push_owned_unchecked(cls);
        }
    }

    PyObject* name_;
    Namespace* named_;
    PyTypeObject* none_type_;
    PyTypeObject* last_leaf_ = nullptr;
    static constexpr std::size_t kSets = 4;
    SeenSet seen_[kSets];
    unsigned used_ = 0;                     // one bit for each set that holds classes
    std::unique_ptr<ObjectStack> dropped_;  // classes without any other reference
    Held custom_;  // the last registration that `classify` returned: another thread may remove it
};

// Whether the class belongs to a built-in kind. It is then a node in every namespace and cannot be
// registered.
inline bool is_builtin_node(const State& state, PyObject* cls) noexcept {
    return std::find_if(std::begin(state.classes), std::end(state.classes),
                        [cls](const Ref& known) { return known.get() == cls; }) !=
           std::end(state.classes);
}

}  // namespace optree
