//! What the audit log notes of a request.

use std::{net::IpAddr, sync::Arc};

use axum::{
    extract::{MatchedPath, Request},
    http::{HeaderValue, Method},
};

use super::routes::{Name, Noted};
use crate::{
    auth::Role,
    clock,
    ops::audit_log::{AuditTrail, Weight},
    store::audit_log::{Entry, Origin, Target},
};

/// The longest id that is noted of a path, in bytes: clients can ask for any.
const ID_MAX: usize = 100;

/// A request that is to be noted once it is known what came of it.
pub(super) struct Witness {
    trail: AuditTrail,
    origin: Arc<Origin>,
    action: Arc<str>,
    noted: Noted,
    target: Option<Target>,
    reads: bool,
    outcome: &'static str,
}

impl Witness {
    /// Of a request to a route; `None` if nobody wants to know.
    pub(super) fn of(
        trail: &AuditTrail,
        name: &Name,
        request: &Request,
        id: &HeaderValue,
        client: Option<IpAddr>,
    ) -> Option<Self> {
        let method = match request.method() {
            &Method::HEAD => &Method::GET,
            method => method,
        };
        let (_, noted, action) = name.noted.iter().find(|(known, ..)| known == method)?;
        let template = request.extensions().get::<MatchedPath>();
        let target = template.and_then(|path| target(path.as_str(), request.uri().path()));
        Some(Self {
            trail: trail.clone(),
            origin: Arc::new(Origin::request(id.to_str().unwrap_or_default(), client)),
            action: Arc::clone(action),
            noted: *noted,
            target,
            reads: method.is_safe(),
            outcome: "abandoned",
        })
    }

    /// Runs the request's handler.
    pub(super) async fn watch<T>(&self, work: impl Future<Output = T>) -> T {
        Arc::clone(&self.origin).scope(work).await
    }

    /// What came of it: the code of a problem, or none.
    pub(super) fn saw(mut self, problem: Option<&'static str>) {
        self.outcome = problem.unwrap_or("done");
    }
}

/// Also when the client leaves before the answer: a request that was given up was made.
impl Drop for Witness {
    fn drop(&mut self) {
        let actor = self.origin.actor();
        let done = self.outcome == "done";
        let wanted = match self.noted {
            Noted::No => false,
            Noted::OfOperators => actor
                .and_then(|actor| Role::parse(actor.role))
                .is_some_and(Role::operates),
            Noted::Refused => !done,
            Noted::All => true,
        };
        if !wanted {
            return;
        }
        let weight = if done && !self.reads {
            Weight::Whole
        } else {
            Weight::Counted
        };
        let client = self.origin.client.map(|client| {
            if actor.is_some() || weight == Weight::Whole {
                client.to_string()
            } else {
                neighbourhood(client)
            }
        });
        self.trail.add(
            Entry {
                at: clock::now(),
                action: Arc::clone(&self.action),
                actor: actor.cloned(),
                client,
                request_id: self.origin.request_id.clone(),
                target: self.origin.target().cloned().or(self.target.take()),
                outcome: self.outcome,
                times: 1,
            },
            weight,
        );
    }
}

/// What a path is about: the noun before its first id, and its ids.
fn target(template: &str, path: &str) -> Option<Target> {
    let segments = || template.split('/').zip(path.split('/'));
    let kind = segments()
        .zip(template.split('/').skip(1))
        .find(|(_, next)| next.starts_with('{'))
        .map(|((noun, _), _)| noun.to_owned())?;
    let ids: Vec<&str> = segments()
        .filter(|(word, _)| word.starts_with('{'))
        .map(|(_, id)| id)
        .collect();
    let mut id = ids.join("/");
    id.truncate(id.floor_char_boundary(ID_MAX));
    Some(Target { kind, id })
}

/// Whoever is not known is told apart by his network only: a flood from one has one row.
fn neighbourhood(client: IpAddr) -> String {
    match client.to_canonical() {
        IpAddr::V4(address) => {
            let [a, b, c, _] = address.octets();
            format!("{a}.{b}.{c}.0/24")
        }
        IpAddr::V6(address) => {
            let network = address.to_bits() >> 64 << 64;
            format!("{}/64", std::net::Ipv6Addr::from_bits(network))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_says_what_it_is_about() {
        for (template, path, wanted) in [
            ("/v1/sales", "/v1/sales", None),
            (
                "/api/sales/{id}/pause",
                "/api/sales/17/pause",
                Some(("sales", "17")),
            ),
            (
                "/v1/sales/{id}/rounds/{round}",
                "/v1/sales/x/rounds/3",
                Some(("sales", "x/3")),
            ),
        ] {
            let found = target(template, path);
            let found = found.as_ref().map(|t| (t.kind.as_str(), t.id.as_str()));
            assert_eq!(found, wanted, "{template}");
        }
        let long = format!("/v1/sales/{}", "x".repeat(5000));
        assert_eq!(target("/v1/sales/{id}", &long).unwrap().id.len(), ID_MAX);
    }

    #[test]
    fn strangers_are_told_apart_by_their_network() {
        for (address, network) in [
            ("192.0.2.77", "192.0.2.0/24"),
            ("::ffff:192.0.2.77", "192.0.2.0/24"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ] {
            assert_eq!(neighbourhood(address.parse().unwrap()), network);
        }
    }
}
