// SPDX-License-Identifier: Apache-2.0
// Everything the library keeps per interpreter. There are no static Python objects.
#pragma once

#include "cpython/gc_memory.h"
#include "nodes/layout.h"
#include "nodes/registry.h"
#include "nodes/tuple_classes.h"
#include "spec/kind.h"

namespace optree {

// What tree_flatten_one_level() puts its answers together of: classes and functions of the Python part.
struct OneLevel {
    // What the registry says of a kind of nodes.
    struct Handler {
        Ref unflatten_func;  // null for custom nodes
        Ref attributes;      // a dict, to copy
    };
    static constexpr std::size_t kNumIndices = 17;

    Ref output_class;  // null until set
    Ref metadata_class;
    bool lazy_metadata = false;  // bind/one_level.cpp, "original_keys"
    Ref str_original_keys;
    Ref str_type;
    Ref str_path_entry_type;
    Ref indices[kNumIndices];        // (), (0,), (0, 1), ...
    Handler handlers[2][kNumKinds];  // [whether dicts are sorted][kind]; null where there is none

    // Calls visit(ref) for each until it returns other than 0.
    template <class Visit>
    int for_each(Visit&& visit) {
        for (Ref* ref : {&output_class, &metadata_class, &str_original_keys, &str_type,
                         &str_path_entry_type}) {
            if (const int status = visit(*ref)) return status;
        }
        for (Ref& ref : indices) {
            if (const int status = visit(ref)) return status;
        }
        for (auto& of_mode : handlers) {
            for (Handler& handler : of_mode) {
                if (const int status = visit(handler.unflatten_func)) return status;
                if (const int status = visit(handler.attributes)) return status;
            }
        }
        return 0;
    }
    void clear() {
        for_each([](Ref& ref) {
            ref = nullptr;
            return 0;
        });
    }
};

// The path entry classes of the library's own, and the functions that make their instances, as they
// were when the Python part was loaded (walk/paths.cpp).
struct StockClasses {
    static constexpr std::size_t kCount = 5;
    struct Class {
        Ref cls;
        Ref functions;  // a tuple
    };
    Class classes[kCount];

    // Calls visit(ref) for each until it returns other than 0.
    template <class Visit>
    int for_each(Visit&& visit) {
        for (Class& stock : classes) {
            if (const int status = visit(stock.cls)) return status;
            if (const int status = visit(stock.functions)) return status;
        }
        return 0;
    }
    void clear() {
        for_each([](Ref& ref) {
            ref = nullptr;
            return 0;
        });
    }
};

struct State;
LayoutCache& layouts_of_thread(State& state);

// The kind that a class of nodes is of (spec/kinds.def).
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

// An attribute of a module, which is imported.
Ref attribute_of_module(const char* module_name, const char* name);

// A Python object, passed to every builtin as its `self`; specs and iterators hold a reference.
struct State {
    PyObject_HEAD
    Registry registry;
#if defined(Py_GIL_DISABLED)
    std::atomic<std::uint64_t> layouts_epoch;  // how often the caches of all threads were cleared
#else
    LayoutCache own_layouts;
#endif
    TupleFamily namedtuples;
    TupleFamily structseqs;
    OneLevel one_level;
    StockClasses stock;
    BlockPool blocks;
    ObjectPool specs;
    std::uint64_t id = 0;  // unlike that of any other state of the process

    // Classes of ours.
    Ref layout_type;
    Ref loose_layout_type;
    Ref registration_type;
    Ref spec_type;
    Ref iter_type;
    Ref internal_error;
    Ref kind_enum;         // the Python enum PyTreeKind
    Ref kinds[kNumKinds];  // its members

    // The classes whose instances are nodes of a kind; null for kinds without such a class.
    Ref classes[kNumKinds];
    struct ExactClass {
        PyObject* cls;
        Kind kind;
    };
    ExactClass exact[kNumKinds + 1];  // those that Context::classify does not ask for itself
    template <class Node>
    PyObject* class_of() const noexcept {
        return classes[static_cast<int>(kKindOf<Node>)].get();
    }

    // Classes and names of Python's.
    Ref evict_namedtuple;  // weak reference callbacks
    Ref evict_structseq;
    Ref empty_str;
    Ref str_default_factory;
    Ref str_maxlen;
    Ref str_is_leaf;
    Ref str_none_is_leaf;
    Ref str_namespace;
    Ref copyreg_newobj;
    std::atomic<PyObject*> accessors;  // owned: the module optree.accessors, imported at first use

    LayoutTypes layout() const noexcept {
        return {reinterpret_cast<PyTypeObject*>(layout_type.get()),
                reinterpret_cast<PyTypeObject*>(loose_layout_type.get())};
    }
    PyTypeObject* spec() const noexcept { return reinterpret_cast<PyTypeObject*>(spec_type.get()); }
    PyObject* error() const noexcept { return internal_error.get(); }

    // The layouts that this thread has met.
    LayoutCache& layouts() {
#if defined(Py_GIL_DISABLED)
        return layouts_of_thread(*this);
#else
        return own_layouts;
#endif
    }
    // Drops them and the memory kept for the next call: keys need not outlive the program's own objects.
    // Those that other threads have of their own go when these use the library next.
    void forget_layouts() noexcept {
#if defined(Py_GIL_DISABLED)
        ++layouts_epoch;
#else
        own_layouts.clear();
#endif
        blocks.clear();
        specs.clear();
    }

    // An attribute of optree.accessors.
    Ref accessor_class(const char* name);
};

inline State& as_state(PyObject* object) noexcept { return *reinterpret_cast<State*>(object); }

// The state that a class of ours belongs to; kept as an attribute of the class.
State& state_of_type(PyTypeObject* type);
void bind_type_to_state(PyTypeObject* type, State& state);

// A new state. Its classes of walk/ and bind/ are set by bind/.
Ref make_state();

}  // namespace optree
