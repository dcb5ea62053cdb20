// SPDX-License-Identifier: Apache-2.0
#include "nodes/context.h"

#include "nodes/dispatch.h"

namespace optree {

Kind Context::classify_rest(PyTypeObject* type, Registration*& registration) {
    PyObject* cls = type_object(type);
    for (const State::ExactClass* exact = state.exact; exact->cls != nullptr; ++exact) {
        if (exact->cls != cls) continue;
        remember(type, exact->kind);
        return exact->kind;
    }
    if (Ref found = lookup(type)) {
        registration = as_registration(found.get());
        custom_.hold(std::move(found));
        return kKindOf<Custom>;  // not cached: the registration may change
    }
    Kind kind = kLeafKind;
    if (PyType_FastSubclass(type, Py_TPFLAGS_TUPLE_SUBCLASS)) {
        const Ref alive = Ref::borrow(cls);
        for_each_kind([&](auto node) {
            if (!decltype(node)::recognises(state, type)) return true;
            kind = kKindOf<decltype(node)>;
            return false;
        });
    }
    remember(type, kind);
    return kind;
}

}  // namespace optree
