//! Whether the agent keeps up, and whether the node should get traffic.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

/// How long changes may wait, and the loop may stand still, before the agent is no longer healthy. That of kube-proxy:
/// twice its `syncPeriod`.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The families, as kube-proxy has a proxier for each. Here one application is for both.
const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

/// What is known of the agent; told by its loop, read by the servers.
#[derive(Debug)]
pub struct Health {
    needs_node: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// When the loop last went round.
    alive: Instant,
    /// Programs are attached, to maps that were filled, by this agent or an earlier one.
    serving: bool,
    /// Since when changes wait, if any do.
    queued: Option<Instant>,
    /// When something was last applied.
    applied: Option<SystemTime>,
    /// `None`: nothing is known of this node's Node object.
    leaving: Option<bool>,
    /// Everything was told at least once, so that an object that is unknown is not there.
    complete: bool,
}

/// The answer of /healthz and /livez, with kube-proxy's names.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Answer {
    last_updated: Timestamp,
    current_time: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    status: BTreeMap<&'static str, FamilyAnswer>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyAnswer {
    last_updated: Timestamp,
    healthy: bool,
}

impl Answer {
    /// Whether it is that of a healthy agent on a node that should get traffic.
    pub(super) fn is_good(&self) -> bool {
        self.healthy && self.node_eligible != Some(false)
    }
}

fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH)
}

impl Health {
    /// Of an agent that starts now. `needs_node`: a node without a Node object is one that is gone.
    #[must_use]
    pub fn new(needs_node: bool, now: Instant) -> Self {
        let state = State {
            alive: now,
            serving: false,
            queued: None,
            applied: None,
            leaving: None,
            complete: false,
        };
        Self {
            needs_node,
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The loop goes round.
    pub fn alive(&self, now: Instant) {
        self.state().alive = now;
    }

    /// From now on Services are served.
    pub fn serving(&self) {
        self.state().serving = true;
    }

    /// Changes wait since then.
    pub fn queued(&self, since: Instant) {
        self.state().queued.get_or_insert(since);
    }

    /// Nothing waits any more.
    pub fn applied(&self, now: Instant, time: SystemTime) {
        let mut state = self.state();
        state.alive = now;
        state.queued = None;
        state.applied = Some(time);
    }

    /// What is known of this node's Node object, and whether everything was told.
    pub fn node(&self, leaving: Option<bool>, complete: bool) {
        let mut state = self.state();
        state.leaving = leaving;
        state.complete = complete;
    }

    /// Whether the agent keeps up.
    #[must_use]
    pub fn is_healthy(&self, now: Instant) -> bool {
        let state = self.state();
        let recent = |since: Instant| now.saturating_duration_since(since) < TIMEOUT;
        recent(state.alive) && state.queued.is_none_or(recent)
    }

    /// Whether the node should get traffic: not where it is being deleted.
    #[must_use]
    pub fn is_eligible(&self) -> bool {
        let state = self.state();
        match state.leaving {
            Some(leaving) => !leaving,
            // A start without the API server serves as before.
            None => !(self.needs_node && state.complete),
        }
    }

    /// The answer to a request: of /healthz, with the node, or of /livez. A healthy agent is up to date now, whenever it
    /// last had something to do.
    ///
    /// As kube-proxy, an agent that starts is alive; unlike it, it does not take part before it serves, so that an
    /// update of the DaemonSet waits for that on each node.
    pub(super) fn answer(&self, now: Instant, time: SystemTime, with_node: bool) -> Answer {
        let healthy = self.is_healthy(now) && (!with_node || self.state().serving);
        let node_eligible = with_node.then(|| self.is_eligible());
        let applied = self.state().applied.map(timestamp);
        let family = |applied| FamilyAnswer {
            last_updated: applied,
            healthy,
        };
        let mut answer = Answer {
            last_updated: applied.unwrap_or(Timestamp::UNIX_EPOCH),
            current_time: timestamp(time),
            node_eligible,
            healthy,
            status: FAMILIES
                .into_iter()
                .filter_map(|name| Some((name, family(applied?))))
                .collect(),
        };
        if answer.is_good() {
            answer.last_updated = answer.current_time;
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn who_keeps_changes_waiting_for_too_long_is_not_healthy() {
        let begin = Instant::now();
        let health = Health::new(false, begin);
        assert!(health.is_healthy(begin));
        health.queued(begin + SECOND);
        // Later changes wait less.
        health.queued(begin + 30 * SECOND);
        health.alive(begin + 60 * SECOND);
        assert!(health.is_healthy(begin + 60 * SECOND));
        assert!(!health.is_healthy(begin + 61 * SECOND));
        health.applied(begin + 62 * SECOND, SystemTime::now());
        assert!(health.is_healthy(begin + 62 * SECOND));
    }

    #[test]
    fn a_loop_that_stands_still_is_not_healthy() {
        let begin = Instant::now();
        let health = Health::new(false, begin);
        health.applied(begin, SystemTime::now());
        assert!(!health.is_healthy(begin + TIMEOUT));
        health.alive(begin + TIMEOUT);
        assert!(health.is_healthy(begin + TIMEOUT));
    }

    #[test]
    fn a_node_that_leaves_or_is_gone_is_not_eligible() {
        let with = |needs_node, leaving, complete| {
            let health = Health::new(needs_node, Instant::now());
            health.node(leaving, complete);
            health.is_eligible()
        };
        for needs_node in [false, true] {
            assert!(with(needs_node, Some(false), true));
            assert!(!with(needs_node, Some(true), true));
            // Not told yet.
            assert!(with(needs_node, None, false));
        }
        assert!(with(false, None, true), "manifests need not have a Node");
        assert!(!with(true, None, true));
    }

    #[test]
    fn an_agent_that_starts_is_alive_but_does_not_serve_yet() {
        let begin = Instant::now();
        let health = Health::new(false, begin);
        let is_good = |with_node| health.answer(begin, SystemTime::now(), with_node).is_good();
        assert!(is_good(false));
        assert!(!is_good(true));
        health.serving();
        assert!(is_good(false) && is_good(true));
    }

    #[test]
    fn the_answer_has_kube_proxys_fields() {
        let begin = Instant::now();
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let health = Health::new(false, begin);
        health.serving();
        let answer = |now, time, with_node| serde_json::to_value(health.answer(now, time, with_node)).unwrap();
        assert_eq!(
            answer(begin, at(1), false),
            serde_json::json!({
                "lastUpdated": "1970-01-01T00:00:01Z", "currentTime": "1970-01-01T00:00:01Z", "healthy": true,
            })
        );
        health.applied(begin, at(10));
        health.node(Some(true), true);
        let family = |healthy| serde_json::json!({"lastUpdated": "1970-01-01T00:00:10Z", "healthy": healthy});
        assert_eq!(
            answer(begin, at(12), true),
            serde_json::json!({
                "lastUpdated": "1970-01-01T00:00:10Z", "currentTime": "1970-01-01T00:00:12Z", "nodeEligible": false,
                "healthy": true, "status": {"IPv4": family(true), "IPv6": family(true)},
            })
        );
        assert_eq!(
            answer(begin + TIMEOUT, at(72), false),
            serde_json::json!({
                "lastUpdated": "1970-01-01T00:00:10Z", "currentTime": "1970-01-01T00:01:12Z",
                "healthy": false, "status": {"IPv4": family(false), "IPv6": family(false)},
            })
        );
    }
}
