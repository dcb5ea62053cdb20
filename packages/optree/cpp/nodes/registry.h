// SPDX-License-Identifier: Apache-2.0
// Which custom classes are nodes, in which namespace, and where dicts keep their insertion order.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>

#include "support/pointer_map.h"
#include "support/ref.h"

namespace optree {

// What a custom class was registered with. A Python object (never handed out), so that specs keep
// it alive after the class is unregistered.
struct Registration {
    PyObject_HEAD
    PyObject* type;  // owned, like the members below
    PyObject* flatten_func;
    PyObject* unflatten_func;
    PyObject* path_entry_type;
};

inline Registration* as_registration(void* slot) noexcept {
    return static_cast<Registration*>(slot);
}

Ref make_registration_type();
Ref make_registration(PyTypeObject* registration_type, PyObject* type, PyObject* flatten_func,
                      PyObject* unflatten_func, PyObject* path_entry_type);

struct Namespace {
    PointerMap<PyTypeObject, Registration> types;  // owns a reference to each registration
    bool insertion_ordered = false;
};

// Guarded by the interpreter lock. No Python code runs while a map is being changed: what is
// dropped is handed to the caller to drop.
class Registry {
  public:
    Registry() = default;
    Registry(const Registry&) = delete;
    Registry& operator=(const Registry&) = delete;
    ~Registry() { clear(); }

    Namespace& global() noexcept { return global_; }
    // The namespace called `name` (exact str), or null if nothing was ever put there. '' is null.
    Namespace* find(PyObject* name);
    // The same, made if missing; '' is the global one.
    Namespace& get(PyObject* name);

    // The registration of `type` in `named` (may be null) or globally, or null.
    Registration* lookup(const Namespace* named, const PyTypeObject* type) const noexcept {
        if (named != nullptr) {
            if (Registration* found = named->types.find(type)) return found;
        }
        return global_.types.find(type);
    }

    // Number of classes registered in namespaces other than the global one.
    std::size_t named_size() const noexcept;

    void clear() noexcept;
    int traverse(visitproc visit, void* arg) const;

  private:
    Namespace global_;
    std::unordered_map<std::string, std::unique_ptr<Namespace>> named_;
    // The last name looked up, by identity. Owned.
    PyObject* last_name_ = nullptr;
    Namespace* last_ = nullptr;
};

}  // namespace optree
