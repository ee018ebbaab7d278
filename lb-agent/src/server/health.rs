//! Health of the agent, and eligibility of the node for traffic.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use super::metrics::FAMILIES;

/// Time for which changes may wait, and the agent's loop may block, before the agent is unhealthy. kube-proxy's value:
/// twice its `syncPeriod`.
const TIMEOUT: Duration = Duration::from_secs(60);

/// State of the agent; written by its loop, read by the servers.
#[derive(Debug)]
pub struct Health {
    needs_node: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Time of the last iteration of the agent's loop.
    alive: Instant,
    /// Whether programs are attached, to maps that this agent or an earlier one filled.
    serving: bool,
    /// Arrival of the oldest change that is not applied yet.
    queued: Option<Instant>,
    /// Time at which changes were last applied.
    applied: Option<SystemTime>,
    /// Whether this node's Node object is being deleted; `None` without a Node object.
    leaving: Option<bool>,
    /// Whether the source is complete, so that an unknown object does not exist.
    complete: bool,
}

/// The body of /healthz and /livez, with kube-proxy's names.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct HealthBody {
    last_updated: Timestamp,
    current_time: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    status: BTreeMap<&'static str, FamilyBody>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyBody {
    last_updated: Timestamp,
    healthy: bool,
}

impl HealthBody {
    /// Whether the agent is healthy and the node eligible for traffic.
    pub(super) fn is_good(&self) -> bool {
        self.healthy && self.node_eligible != Some(false)
    }
}

fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH)
}

impl Health {
    /// Returns the state of an agent that starts now. With `needs_node`, a node without a Node object is not eligible.
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

    /// Records an iteration of the agent's loop.
    pub fn alive(&self, now: Instant) {
        self.state().alive = now;
    }

    /// Records that Services are served.
    pub fn serving(&self) {
        self.state().serving = true;
    }

    /// Records that changes wait since that time.
    pub fn queued(&self, since: Instant) {
        self.state().queued.get_or_insert(since);
    }

    /// Records that all changes were applied.
    pub fn applied(&self, now: Instant, time: SystemTime) {
        let mut state = self.state();
        state.alive = now;
        state.queued = None;
        state.applied = Some(time);
    }

    /// Sets whether this node's Node object is being deleted (`None` without one), and whether the source is complete.
    pub fn node(&self, leaving: Option<bool>, complete: bool) {
        let mut state = self.state();
        state.leaving = leaving;
        state.complete = complete;
    }

    /// Whether the agent's loop runs, and applies changes in time.
    #[must_use]
    pub fn is_healthy(&self, now: Instant) -> bool {
        let state = self.state();
        let recent = |since: Instant| now.saturating_duration_since(since) < TIMEOUT;
        recent(state.alive) && state.queued.is_none_or(recent)
    }

    /// Whether the node should get traffic: not if it is being deleted.
    #[must_use]
    pub fn is_eligible(&self) -> bool {
        let state = self.state();
        match state.leaving {
            Some(leaving) => !leaving,
            // An agent that starts without the API server serves as before.
            None => !(self.needs_node && state.complete),
        }
    }

    /// Returns the response of /healthz (`with_node`) or /livez. A healthy agent is up to date now, whenever its last
    /// change was.
    ///
    /// An agent that starts is alive, as with kube-proxy. Unlike kube-proxy it is not healthy before it serves, so that a
    /// rollout of the DaemonSet waits for that on each node.
    pub(super) fn answer(&self, now: Instant, time: SystemTime, with_node: bool) -> HealthBody {
        let healthy = self.is_healthy(now) && (!with_node || self.state().serving);
        let node_eligible = with_node.then(|| self.is_eligible());
        let applied = self.state().applied.map(timestamp);
        let family = |applied| FamilyBody {
            last_updated: applied,
            healthy,
        };
        let mut answer = HealthBody {
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
    fn agent_is_unhealthy_if_changes_wait_too_long() {
        let begin = Instant::now();
        let health = Health::new(false, begin);
        assert!(health.is_healthy(begin));
        health.queued(begin + SECOND);
        // Later changes do not reset the wait.
        health.queued(begin + 30 * SECOND);
        health.alive(begin + 60 * SECOND);
        assert!(health.is_healthy(begin + 60 * SECOND));
        assert!(!health.is_healthy(begin + 61 * SECOND));
        health.applied(begin + 62 * SECOND, SystemTime::now());
        assert!(health.is_healthy(begin + 62 * SECOND));
    }

    #[test]
    fn agent_is_unhealthy_if_its_loop_blocks() {
        let begin = Instant::now();
        let health = Health::new(false, begin);
        health.applied(begin, SystemTime::now());
        assert!(!health.is_healthy(begin + TIMEOUT));
        health.alive(begin + TIMEOUT);
        assert!(health.is_healthy(begin + TIMEOUT));
    }

    #[test]
    fn deleted_node_is_not_eligible() {
        let with = |needs_node, leaving, complete| {
            let health = Health::new(needs_node, Instant::now());
            health.node(leaving, complete);
            health.is_eligible()
        };
        for needs_node in [false, true] {
            assert!(with(needs_node, Some(false), true));
            assert!(!with(needs_node, Some(true), true));
            // The source is not complete yet.
            assert!(with(needs_node, None, false));
        }
        assert!(with(false, None, true), "manifests need not contain a Node");
        assert!(!with(true, None, true));
    }

    #[test]
    fn starting_agent_is_alive_but_not_healthy() {
        let begin = Instant::now();
        let health = Health::new(false, begin);
        let is_good = |with_node| health.answer(begin, SystemTime::now(), with_node).is_good();
        assert!(is_good(false));
        assert!(!is_good(true));
        health.serving();
        assert!(is_good(false) && is_good(true));
    }

    #[test]
    fn response_has_the_fields_of_kube_proxy() {
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
