// SPDX-License-Identifier: Apache-2.0
// The defaults of a kind, which its own file may override, and the protocol for its children.
#pragma once

#include "nodes/context.h"
#include "nodes/look_ahead.h"
#include "nodes/slots.h"
#include "nodes/text.h"

namespace optree {

struct AnyNode {
    // The class of path entries (optree.accessors) that lead to a child; a custom class has its own.
    static constexpr const char* kEntryClass = "SequenceEntry";
    // Whether messages name the class, as the kind does not.
    static constexpr bool kNamedByClass = false;
    // What messages about the number of children begin with; null: the name.
    static constexpr const char* kArityName = nullptr;
    // Whether children are pushed on `visitor.stack()`.
    static constexpr bool kStacksChildren = true;
    // Whether `rebuild` runs Python code only inside of `state.running_python` or a collection, but for
    // what goes when memory ends.
    static constexpr bool kRebuildsQuietly = false;

    // Whether `copy(count, find)` makes a node of leaves that stand in a row, as copied_list does.
    static constexpr bool kCopies = false;

    // The one class of the nodes, if there is one and Python has it; else null.
    static Ref find_class() { return nullptr; }
    // Whether a subclass of tuple makes nodes of this kind. May run Python code.
    static bool recognises(State&, PyTypeObject*) { return false; }
    // Whether there are no children; does not need a frame.
    static bool is_empty(const State&, PyObject*) noexcept { return false; }
    // One step of a path as Python code.
    static Ref step(const Slot*, std::uint32_t, PyObject* entry) { return step_of_entry(entry); }
    // Raises where the pickle of a node can't be right. The slots have been read.
    static void verify(const ReadNode&, const Ref*) {}
};

// A visitor takes the children of an object in traversal order. Kinds call, as fits them,
//
//   expect(n)       first, where the number is known: makes room, or refuses
//   borrowed(child) a child that the object keeps alive while it is visited
//   at_once(children, n)
//                   one or more such; takes the first ones that it can take without running Python
//                   code, and returns how many
//   owned(ref)      a child whose reference is given away
//   room(n), put(children, n)
//                   where to write one or more, borrowed, and that they are all there; the object is
//                   not asked for them again
//   stack()         where to push new references to children that are visited when `visit` is done
//
// `Section` keeps other threads from changing a list while it is visited, and `kAsksEmpty` says that
// containers are known to have children where those without are alike. This visitor collects.
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
