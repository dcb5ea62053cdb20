// SPDX-License-Identifier: Apache-2.0
// Building, walking and copying of structures.
#include "check.h"

#include <algorithm>
#include <cstring>

namespace optree::testing {
namespace {

std::uint32_t count(const char* text, const char* tokens) {
    std::uint32_t total = 0;
    for (; *text != '\0'; ++text) total += std::strchr(tokens, *text) != nullptr ? 1 : 0;
    return total;
}

void counts_follow_the_text() {
    for (const char* text : kTrees) {
        const Tree tree = tree_of(text);
        CHECK_EQUAL(tree.leaves, count(text, "*"));
        CHECK_EQUAL(tree.nodes.size(), std::size_t{count(text, "N([{")});
        CHECK_EQUAL(tree.num_nodes(), std::size_t{count(text, "*N([{")});
        CHECK_EQUAL(tree.slots.size(), std::size_t{count(text, "{")});
        if (!tree.nodes.empty()) {
            CHECK_EQUAL(tree.root().leaves, tree.leaves);
            CHECK_EQUAL(tree.root().leaf_end, tree.leaves);
            CHECK_EQUAL(std::size_t{tree.root().span}, tree.nodes.size());
        }
    }
}

void a_tree_reads_back_as_it_was_written() {
    for (const char* text : kTrees) CHECK_EQUAL(text_of(tree_of(text)), std::string(text));
}

// The reversed token sequence is the text read backwards, without the opening brackets.
void a_cursor_visits_every_token_once_from_the_right() {
    for (const char* text : kTrees) {
        const Tree tree = tree_of(text);
        std::string visited;
        Cursor cursor = Cursor::end_of(tree);
        while (cursor.node_end != 0 || cursor.leaf_end != 0) {
            if (const Node* node = cursor.node()) {
                visited += node->kind == Kind::none    ? 'N'
                           : node->kind == Kind::tuple ? ')'
                           : node->kind == Kind::list  ? ']'
                                                       : '}';
                cursor.enter();
            } else {
                visited += '*';
                cursor.leaf();
            }
        }
        std::string expected;
        for (const char* c = text; *c != '\0'; ++c) {
            if (std::strchr("([{", *c) == nullptr) expected += *c;
        }
        std::reverse(expected.begin(), expected.end());
        CHECK_EQUAL(visited, expected);
    }
}

void skipping_the_root_ends_the_walk() {
    for (const char* text : kTrees) {
        const Tree tree = tree_of(text);
        Cursor cursor = Cursor::end_of(tree);
        CHECK_EQUAL(cursor.subtree_leaves(), tree.leaves);
        cursor.skip();
        CHECK_EQUAL(cursor.node_end, 0U);
        CHECK_EQUAL(cursor.leaf_end, 0U);
    }
}

// Copies every child of every tree after another tree, so that all offsets change.
void a_copied_subtree_reads_like_the_original() {
    for (const char* text : kTrees) {
        const Tree tree = tree_of(text);
        if (tree.nodes.empty()) continue;
        Stack<Subtree> children;
        children_of(tree, whole(tree), children);
        for (const Subtree& child : children) {
            Tree copy;
            Builder build(copy);
            build.leaf();
            std::uint32_t shared = 0;
            build.append(tree, child, [&](Slot slot) {
                ++shared;
                return slot;
            });
            CHECK_EQUAL(build.last_leaves(), child.leaves);
            CHECK_EQUAL(build.last_span(), child.last_node - child.first_node);
            build.close(Kind::tuple, 2);
            CHECK_EQUAL(build.open(), std::size_t{1});
            CHECK_EQUAL(text_of(copy), "(*" + text_of(tree, child) + ")");
            CHECK_EQUAL(std::size_t{shared}, copy.slots.size());
        }
    }
}

void payloads_stay_with_their_nodes() {
    const Tree tree = tree_of("{*{*}[{}]}");
    CHECK_EQUAL(tree.slots.size(), std::size_t{3});
    std::uintptr_t expected = 1;
    for (const Node& node : tree.nodes) {
        if (node.kind != Kind::dict) continue;
        CHECK_EQUAL(reinterpret_cast<std::uintptr_t>(tree.slots[node.payload]), expected++);
    }
    CHECK_EQUAL(expected, std::uintptr_t{4});
}

void closing_more_than_is_open_is_refused() {
    Tree tree;
    Builder build(tree);
    build.leaf();
    bool refused = false;
    try {
        build.close(Kind::tuple, 2);
    } catch (const std::logic_error&) {
        refused = true;
    }
    CHECK(refused);
}

template <class Call>
bool refuses(Call&& call) {
    try {
        call();
    } catch (const std::length_error&) {
        return true;
    }
    return false;
}

void counts_that_do_not_fit_are_refused() {
    CHECK_EQUAL(checked_count(kMaxCount), static_cast<std::uint32_t>(kMaxCount));
    CHECK(refuses([] { checked_count(kMaxCount + 1); }));
    CHECK(refuses([] { checked_count(std::uint64_t{1} << 32); }));  // 0 in 32 bits
}

void copying_more_than_fits_is_refused() {
    Tree leaves;
    leaves.leaves = static_cast<std::uint32_t>(kMaxCount);
    Tree slots = tree_of("{{*}}");
    slots.nodes.back().payload = static_cast<std::uint32_t>(kMaxCount);
    for (const Tree* many : {&leaves, &slots}) {
        Tree tree;
        Builder build(tree);
        build.leaf();
        CHECK(refuses([&] { build.append(*many, whole(*many), [](Slot slot) { return slot; }); }));
        CHECK_EQUAL(tree.leaves, 1U);
        CHECK(tree.nodes.empty() && tree.slots.empty());
    }
}

}  // namespace
}  // namespace optree::testing

int main() {
    using namespace optree::testing;
    counts_follow_the_text();
    a_tree_reads_back_as_it_was_written();
    a_cursor_visits_every_token_once_from_the_right();
    skipping_the_root_ends_the_walk();
    a_copied_subtree_reads_like_the_original();
    payloads_stay_with_their_nodes();
    closing_more_than_is_open_is_refused();
    counts_that_do_not_fit_are_refused();
    copying_more_than_fits_is_refused();
    return 0;
}
