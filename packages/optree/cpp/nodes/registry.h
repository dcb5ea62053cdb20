// SPDX-License-Identifier: Apache-2.0
// Which custom classes are nodes in which namespace, and where dicts keep their insertion order.
#pragma once

#include <memory>
#include <unordered_map>

#include "support/pointer_map.h"
#include "support/ref.h"
#include "support/sharing.h"

namespace optree {

struct Attributes;

// The arguments with which a custom class was registered. It is a Python object so that specs can
// keep it alive after the class is unregistered, and so that the garbage collector sees cycles
// through it. Never changes.
struct Registration {
    PyObject_HEAD
    PyObject* type;  // owned, like the members below
    PyObject* flatten_func;
    PyObject* unflatten_func;
    PyObject* path_entry_type;
    Attributes* attributes;  // owned; null unless the class consists only of its attributes
};

inline Registration* as_registration(void* slot) noexcept {
    return static_cast<Registration*>(slot);
}

Ref make_registration_type();
Ref make_registration(PyTypeObject* registration_type, PyObject* type, PyObject* flatten_func,
                      PyObject* unflatten_func, PyObject* path_entry_type,
                      std::unique_ptr<Attributes> attributes);

struct Namespace {
    using Types = PointerMap<PyTypeObject, Registration>;

    Ref name;                // an exact str, null for the global namespace
    Published<Types> types;  // owns one reference to each registration
    std::atomic<bool> insertion_ordered = false;
    Namespace* next = nullptr;  // the namespace created before this one

    std::size_t size() const noexcept {
        const ReaderSection section;
        return types.peek().size();
    }
};

// Namespaces by the hash of their name.
using NamespaceTable = std::unordered_multimap<Py_hash_t, Namespace*>;

// Read without a lock. Objects that a change removes are dropped after the lock is released, since
// that may run Python code.
class Registry {
  public:
    Registry() = default;
    Registry(const Registry&) = delete;
    Registry& operator=(const Registry&) = delete;
    ~Registry();

    Namespace& global() noexcept { return global_; }
    // The namespace called `name` (an exact str), or null if it was never used. Returns null for
    // ''. A namespace lives as long as the registry.
    Namespace* find(PyObject* name);
    // The same, created if missing; '' is the global namespace.
    Namespace& get(PyObject* name);

    // The registration of `type` in `named` (may be null) or in the global namespace, or null.
    Ref lookup(const Namespace* named, const PyTypeObject* type) const noexcept {
        const ReaderSection section;
        Registration* found = named != nullptr ? named->types.peek().find(type) : nullptr;
        if (found == nullptr) found = global_.types.peek().find(type);
        return Ref::borrow(reinterpret_cast<PyObject*>(found));
    }

    // Adds a registration of `type`. Returns false if there already is one.
    bool add(Namespace& space, PyTypeObject* type, const Ref& registration);
    // Removes and returns the registration of `type`; null if there is none.
    Ref remove(Namespace& space, PyTypeObject* type);

    // A number that changes with every registration and removal.
    std::uint64_t version() const noexcept { return version_.load(std::memory_order_acquire); }

    // The number of classes registered in namespaces other than the global one.
    std::size_t named_size() const noexcept;

    void clear() noexcept;
    int traverse(visitproc visit, void* arg) const;

  private:
    Lock lock_;  // held while any of the members below is changed
    Namespace global_;
    Published<NamespaceTable> named_;
    std::atomic<Namespace*> newest_{nullptr};
    std::atomic<std::uint64_t> version_{0};
    // The last name looked up, found by identity (owned). Saves 30 instructions in each call with a
    // namespace. Not used if threads would have to share it.
    PyObject* last_name_ = nullptr;
    Namespace* last_ = nullptr;

    void forget_last_name() noexcept;
    template <class Visit>
    void for_each_named(Visit&& visit) const {
        for (Namespace* space = newest_; space != nullptr; space = space->next) visit(*space);
    }
};

}  // namespace optree
