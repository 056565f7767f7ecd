#pragma once

namespace fastprompt {

// Runs work(context, part) for every part in [0, parts) on at most `threads` threads, this one
// among them, and returns when all are done. Parts are taken in turn by whoever is free.
void parallel(int parts, int threads, void (*work)(void*, int), void* context);

}  // namespace fastprompt
