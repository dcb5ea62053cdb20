// SPDX-License-Identifier: Apache-2.0
// All data that the library keeps for one interpreter. There are no static Python objects.
#pragma once

#include "cpython/gc_memory.h"
#include "nodes/layout.h"
#include "nodes/registry.h"
#include "nodes/tuple_classes.h"
#include "spec/kind.h"

namespace optree {

// The classes and functions of the Python part from which tree_flatten_one_level() builds its
// results.
struct OneLevel {
    static constexpr std::size_t kNumIndices = 17;

    Ref output_class;  // null until set
    Ref metadata_class;
    bool lazy_metadata = false;  // see "original_keys" in bind/one_level.cpp
    Ref str_original_keys;
    Ref str_type;
    Ref str_path_entry_type;
    Ref indices;      // ((), (0,), (0, 1), ...), kNumIndices of them
    Ref handlers[2];  // [whether dicts are sorted]: a tuple as set_one_level() takes it
};

struct State;
LayoutCache& layouts_of_thread(State& state);

// The kind of a class of nodes (spec/kinds.def).
template <class Node>
inline constexpr Kind kKindOf = kLeafKind;
#define OPTREE_KIND(value, name, python_name, cls, ...) \
    struct cls;                                         \
    template <>                                         \
    inline constexpr Kind kKindOf<cls> = Kind::name;
#define OPTREE_VALUE(value, name, python_name)
#include "spec/kinds.def"

inline PyObject* type_object(PyTypeObject* type) noexcept {
    return reinterpret_cast<PyObject*>(type);
}

// An attribute of a module, which is imported if necessary.
Ref attribute_of_module(const char* module_name, const char* name);

// The members. They are constructed and destroyed together.
struct StateMembers {
    Registry registry;
#if defined(Py_GIL_DISABLED)
    std::atomic<std::uint64_t> layouts_epoch{
        0};  // how often the caches of all threads were cleared
#else
    LayoutCache own_layouts;
#endif
    TupleClasses tuples;
    CollectorPause collector_pause;
    OneLevel one_level;
    BlockPool blocks;
    ObjectPool specs;
    std::uint64_t id = 0;  // unique among the states of the process

    // Our own classes.
    Ref layout_type;
    Ref loose_layout_type;
    Ref registration_type;
    Ref spec_type;
    Ref iter_type;
    Ref internal_error;
    Ref kind_enum;         // the Python enum PyTreeKind
    Ref kinds[kNumKinds];  // its members
    // The library's own path entry classes and the accessor class. A dict from each class to a
    // tuple of the functions that made its instances when the Python part was loaded
    // (walk/paths.cpp).
    Ref stock;

    // The class whose instances are nodes of a kind; null for kinds without such a class.
    Ref classes[kNumKinds];
    struct ExactClass {
        PyObject* cls;
        Kind kind;
    };
    ExactClass exact[kNumKinds + 1];  // classes that Context::classify does not check itself
    template <class Node>
    PyObject* class_of() const noexcept {
        return classes[static_cast<int>(kKindOf<Node>)].get();
    }

    // Classes and names of Python.
    Ref evict_tuple_class;  // the callback of weak references
    Ref empty_str;
    Ref str_default_factory;
    Ref str_maxlen;
    Ref str_is_leaf;
    Ref str_none_is_leaf;
    Ref str_namespace;
    Ref copyreg_newobj;
    std::atomic<PyObject*> accessors{
        nullptr};  // owned: the module optree.accessors, imported at first use
};

struct StateHead {
    PyObject_HEAD
};

// A Python object, passed as `self` to every builtin. Specs and iterators hold a reference to it.
struct State : StateHead, StateMembers {
    LayoutTypes layout() const noexcept {
        return {reinterpret_cast<PyTypeObject*>(layout_type.get()),
                reinterpret_cast<PyTypeObject*>(loose_layout_type.get())};
    }
    PyTypeObject* spec() const noexcept { return reinterpret_cast<PyTypeObject*>(spec_type.get()); }
    PyObject* error() const noexcept { return internal_error.get(); }

    // The layouts that this thread has seen.
    LayoutCache& layouts() {
#if defined(Py_GIL_DISABLED)
        return layouts_of_thread(*this);
#else
        return own_layouts;
#endif
    }
    // Drops them, together with memory kept for the next call, so that keys do not outlive the
    // objects of the program. The caches of other threads are dropped when those threads next use
    // the library.
    void forget_layouts() noexcept {
#if defined(Py_GIL_DISABLED)
        ++layouts_epoch;
#else
        own_layouts.clear();
#endif
        blocks.clear();
        specs.clear();
    }

    // Makes a call that may run Python code in the middle of a rebuild.
    template <class Call>
    OPTREE_INLINE auto running_python(Call&& call) {
        collector_pause.end();
        const TupleClasses::Stretch loud(tuples, false);
        return calling_python(std::forward<Call>(call));
    }

    // An attribute of optree.accessors.
    Ref accessor_class(const char* name);
};

inline State& as_state(PyObject* object) noexcept { return *reinterpret_cast<State*>(object); }

// The state that one of our classes belongs to, stored as an attribute of the class.
State& state_of_type(PyTypeObject* type);
void bind_type_to_state(PyTypeObject* type, State& state);

// A new state. The code in bind/ sets its classes of walk/ and bind/.
Ref make_state();

}  // namespace optree
