/* What threads without a common lock owe each other: which of their accesses come in which order, and why.
 *
 * Only this file says it. Each access that takes part carries a comment "order: SEQUENCE N" on its line, for step N of one of the
 * sequences below. tests/native/test_orders.py reads the sequences here and the memory order of each step from the line that carries its
 * comment, and tries every order that the C standard, or an ARMv8 processor, allows between two threads. It fails where a step is missing,
 * has another kind, or is too weak, so this file and the code cannot drift apart. An access that is weaker than sequentially consistent
 * and takes part in nothing says "order: alone: why" instead.
 *
 * The rule. "Store mine, then look at yours" on both sides: at least one of the two must see the other. Only a sequentially consistent
 * store and a sequentially consistent load (or a full fence between them) give that. A relaxed load may be satisfied before the store on
 * arm64, and x86 never shows it.
 *
 * Counting, by a writer (shm/queue.c). What was written lies before the total, the total before the marks, the marks before `dirty`. The
 * writer that turns `dirty` from 0 to 1 looks whether the owner is armed, and rings. A mark that is there still is not made again: the
 * owner takes it away before it looks at what is marked, so it will find the new total too.
 *   sequence name: store imm
 *   sequence count: store count, load bitmap, or bitmap, load summary, or summary, load dirty, swap dirty, load armed
 *
 * Counting, by the owner. It clears `dirty` first and looks at the marks after that; before it sleeps it arms and looks at `dirty` once
 * more. A count is then found by this look, or found by the next one, for which the writer has rung.
 *   sequence drain: load dirty, store dirty, load summary, swap summary, swap bitmap
 *   sequence take: load count, load imm, store drained
 *   sequence arm: store armed
 *
 * A slot is given to another value once the owner says that it has taken all arrivals of the last one.
 *   sequence recycle: load drained
 *
 * Writing under a grant (shm/shm.h). The writer says where it is and then looks whether it may be there; the owner forbids and then looks
 * where the writer is. Counts are published in between, so that they are final when the owner has found no writer inside.
 *   sequence enter: store grant, load barred, load word
 *   sequence leave: store grant
 *   sequence revoke: store word
 *   sequence look: load grant
 *   sequence bar: store barred
 *   sequence inside: load grant
 *
 * The turn of a rail (fabric/queue.c). A thread that wants the turn and does not get it leaves word; the one that has the turn looks for
 * that after giving it back.
 *   sequence turn wanted: store missed, fence, lock progress_lock
 *   sequence turn over: unlock progress_lock, swap missed
 */
#ifndef AT_ORDERS_H
#define AT_ORDERS_H
#endif
