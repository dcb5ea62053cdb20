// SPDX-License-Identifier: Apache-2.0
// Registered classes. The slots are the registration, the metadata and the entries.
#pragma once

#include "nodes/sequence.h"

namespace optree {

struct Custom : AnyNode {
    static constexpr const char* kName = "custom";
    static constexpr const char* kArityName = "Custom type";
    static constexpr bool kNamedByClass = true;
    // The first slot must already hold the registration.
    template <class Visitor>
    static std::uint32_t visit(Context&, PyObject* object, Visitor& visitor, Ref* slots) {
        return expand(object, visitor.stack(), slots);
    }
    static PyObject* rebuild(State&, const Slot* slots, PyObject** children, std::size_t count);
    static void match(Context& context, const Slot* slots, std::uint32_t arity, PyObject* object,
                      ObjectStack& children);
    static Ref step(const Slot* slots, std::uint32_t child, PyObject* entry);
    static std::string text(const Slot* slots, const Texts& children);

  private:
    static std::uint32_t expand(PyObject* object, ObjectStack& children, Ref* slots);
};

}  // namespace optree
