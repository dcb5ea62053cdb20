// SPDX-License-Identifier: Apache-2.0
// The defaults of a kind, which the file of the kind may override, and the interface for visiting
// its children.
#pragma once

#include "nodes/context.h"
#include "nodes/look_ahead.h"
#include "nodes/slots.h"
#include "nodes/text.h"

namespace optree {

struct AnyNode {
    // The class of the path entries (optree.accessors) that lead to a child. A custom class defines
    // its own.
    static constexpr const char* kEntryClass = "SequenceEntry";
    // Whether messages name the class because the kind is not specific.
    static constexpr bool kNamedByClass = false;
    // The first words of messages about the number of children; null: the name.
    static constexpr const char* kArityName = nullptr;
    // Whether children are pushed on `visitor.stack()`.
    static constexpr bool kStacksChildren = true;
    // Whether `rebuild` runs Python code only inside `state.running_python` or a collection, apart
    // from cleanup when memory runs out.
    static constexpr bool kRebuildsQuietly = false;

    // Whether `copy(count, find)` creates a node from contiguous leaves, as copied_list does.
    static constexpr bool kCopies = false;

    // The single class of the nodes; null if there is none or this Python lacks it.
    static Ref find_class() { return nullptr; }
    // Whether a subclass of tuple creates nodes of this kind. May run Python code.
    static bool recognises(State&, PyTypeObject*) { return false; }
    // Whether there are no children; such a node needs no frame.
    static bool is_empty(const State&, PyObject*) noexcept { return false; }
    // One step of a path as Python code.
    static Ref step(const Slot*, std::uint32_t, PyObject* entry) { return step_of_entry(entry); }
    // Raises if the pickle of a node cannot be valid. The slots have been read.
    static void verify(const ReadNode&, const Ref*) {}
};

// A visitor takes the children of an object in traversal order. Each kind calls the functions that
// suit it:
//
//   expect(n)       first, if the number is known: makes room or raises
//   borrowed(child) a child that the object keeps alive during the visit
//   at_once(children, n)
//                   one or more of these; takes the first ones that it can take without running
//                   Python code and returns how many it took
//   owned(ref)      a child whose reference is handed over
//   room(n), put(children, n)
//                   the address for one or more borrowed children, and the call after they are
//                   written; the object is not asked for them again
//   stack()         the stack for new references to children that are visited after `visit` returns
//
// `Section` keeps other threads from changing a list during the visit. `kAsksEmpty` says that a
// container is known to have children if its kind has interchangeable empty containers. This
// visitor collects the children.
class Collect {
  public:
    using Section = CriticalSection;
    static constexpr bool kAsksEmpty = false;
    explicit Collect(ObjectStack& children) : children_(children) {}
    OPTREE_INLINE void expect(std::size_t count) { children_.reserve(count); }
    OPTREE_INLINE void borrowed(PyObject* child) { children_.push_unchecked(child); }
    OPTREE_INLINE std::size_t at_once(PyObject* const* children, std::size_t count) {
        children_.push_all(children, count);
        return count;
    }
    void owned(Ref child) { children_.push_owned(child.release()); }
    OPTREE_INLINE PyObject** room(std::size_t count) { return children_.room(count); }
    OPTREE_INLINE void put(PyObject** children, std::size_t count) noexcept {
        take_references(children, children, count);
        children_.adopt(count);
    }
    ObjectStack& stack() noexcept { return children_; }

  private:
    ObjectStack& children_;
};

}  // namespace optree
