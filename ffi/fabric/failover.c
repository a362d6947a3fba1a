/* One of several connections has broken: both sides fence it and tell each other, in control messages by one of the others, what they have counted
 * by it. What was not among that goes out again, by whichever is up. No event loop has a hand in this.
 *
 * The number that a side tells is final: its endpoint is closed, and everything that had arrived has been handed out. It is told again
 * whenever another connection breaks or comes up, since the control message may have been lost; told twice it changes nothing, and told late, of a
 * generation that is over, neither. Where no connection is left the engines ask each other by their control connection (at_fab_member_failed). */

#include "fabric.h"

void at_fab_read_failed(at_fab_conn *carrier, const at_fab_ctrl *ctrl) {
    at_lane *lane = carrier->peer->lane;
    if (carrier->multirail == NULL || ctrl->failed_count > AT_FAB_FAILED) return;
    for (uint32_t i = 0; i < ctrl->failed_count; i++) {
        at_fab_conn *conn = at_fab_conn_of(lane, ctrl->failed[i].peer);
        if (conn == NULL || conn == carrier || conn->multirail != carrier->multirail || conn->retired) continue;
        if (conn->generation > ctrl->failed[i].generation) continue; /* of a connection before this one, which is settled */
        at_peer *peer = conn->peer;
        peer->users++;
        if (conn->ep != NULL) at_fab_conn_break(conn, 0); /* the other side has it opened again */
        at_fab_reconcile(conn, ctrl->failed[i].arrived);
        at_fab_multirail_refill(conn->multirail);
        at_peer_release(peer);
    }
}

void at_fab_tell_failed(at_fab_multirail *multirail) {
    for (uint32_t i = 0; i < multirail->count; i++) {
        at_fab_conn *conn = multirail->members[i];
        if (conn == NULL || conn->ep == NULL || !conn->heard || conn->telling) continue;
        at_fab_tell(conn);
        if (conn->telling) return;
    }
}

void at_fab_owe_failed(at_fab_multirail *multirail) {
    at_fab_owe(multirail);
    at_fab_tell_failed(multirail);
}
