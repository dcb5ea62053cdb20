// SPDX-License-Identifier: Apache-2.0
// Support for the tests of spec/: checks that report their line, and trees written as text.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "spec/tree.h"

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            std::fprintf(stderr, "%s:%d: expected %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                                 \
        }                                                                                 \
    } while (false)

#define CHECK_EQUAL(got, expected)                                                             \
    do {                                                                                       \
        const auto got_value = (got);                                                          \
        const auto expected_value = (expected);                                                \
        if (!(got_value == expected_value)) {                                                  \
            std::fprintf(stderr, "%s:%d: %s: got %s, expected %s\n", __FILE__, __LINE__, #got, \
                         optree::testing::show(got_value).c_str(),                             \
                         optree::testing::show(expected_value).c_str());                       \
            std::exit(1);                                                                      \
        }                                                                                      \
    } while (false)

namespace optree::testing {

inline std::string show(const std::string& text) { return text; }
inline std::string show(const char* text) { return text; }
template <class Number>
std::string show(Number number) {
    return std::to_string(number);
}

// A tree from text: `*` is a leaf, `N` is None, `(...)` a tuple, `[...]` a list and `{...}` a dict,
// whose layout slot is `next_slot`, counted from 1.
class Reader {
  public:
    Reader(const char* text, Tree& tree) : text_(text), build_(tree), tree_(tree) {}

    void read() {
        const char token = *text_++;
        if (token == '*') return build_.leaf();
        if (token == 'N') return build_.close(Kind::none, 0);
        std::uint32_t arity = 0;
        while (*text_ != ')' && *text_ != ']' && *text_ != '}') {
            read();
            ++arity;
        }
        ++text_;
        if (token == '{') tree_.slots.push_back(reinterpret_cast<Slot>(next_slot_++));
        build_.close(token == '(' ? Kind::tuple : token == '[' ? Kind::list : Kind::dict, arity);
    }
    const Builder& builder() const { return build_; }

  private:
    const char* text_;
    Builder build_;
    Tree& tree_;
    std::uintptr_t next_slot_ = 1;
};

inline Tree tree_of(const char* text) {
    Tree tree;
    Reader(text, tree).read();
    return tree;
}

// The inverse of Reader, by the reversed walk of a cursor.
inline std::string text_of(const Tree& tree, const Subtree& part) {
    if (part.is_leaf()) return "*";
    const Node& root = part.root(tree);
    if (root.kind == Kind::none) return "N";
    Stack<Subtree> children;
    children_of(tree, part, children);
    std::string text = root.kind == Kind::tuple ? "(" : root.kind == Kind::list ? "[" : "{";
    for (const Subtree& child : children) text += text_of(tree, child);
    return text + (root.kind == Kind::tuple ? ")" : root.kind == Kind::list ? "]" : "}");
}

inline std::string text_of(const Tree& tree) { return text_of(tree, whole(tree)); }

// Trees of every shape: leaves first, last, between or missing; empty containers; chains.
inline const char* const kTrees[] = {
    "*",           "N",           "()",        "[]",         "{}",           "(*)",
    "(**)",        "(*(*))",      "((*)*)",    "(*(**)*)",   "[[[[*]]]]",    "([*]{**}N)",
    "{*(*[*])N}",  "(()[]{}N)",   "(*N*N*)",   "((**)(**))", "[*[*[*[*]]]]", "[[[[*]*]*]*]",
    "{{*}{*}{*}}", "(*********)", "([****]*)", "(*[****])",  "((()))",       "(N(N(N)))",
};

}  // namespace optree::testing
