// SPDX-License-Identifier: Apache-2.0
// Memory for new tensors that is used again when they are gone.
//
// Memory that comes new from the system costs a page fault every 4 KiB, several times what a kernel needs to fill it,
// and the C library gives large blocks back to the system as soon as they are freed. An optimizer that returns a new
// state for each old one asks for blocks of the same sizes in every step, so they are kept for the next one. A block
// is taken back when torch releases the storage made from it, that is when the last tensor, view or graph that uses it
// is gone; nothing is inferred from reference counts.
#pragma once

#include <cstddef>

namespace torchopt::buffers {

/// A block of at least `bytes` bytes, aligned to 64.
void* take(std::size_t bytes);

/// Gives back what `take(bytes)` returned. Any thread may call it, with or without the interpreter lock.
void give_back(void* block, std::size_t bytes) noexcept;

/// Keeps other threads out until `unlock`, for a fork: a child would inherit a locked mutex.
void lock();
void unlock() noexcept;

/// Frees all blocks that are not in use.
void release() noexcept;

/// Blocks that are not in use are kept up to so many bytes in all; returns the previous limit.
std::size_t set_limit(std::size_t bytes) noexcept;

/// Bytes that are kept, and bytes that are in use.
struct Usage {
    std::size_t kept, used;
};
Usage usage() noexcept;

}  // namespace torchopt::buffers
