//! What this process waits for before it wants traffic: set by those who know, shown by `/readyz`.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

/// The named conditions of being ready. Clones share them.
#[derive(Clone, Debug)]
pub struct Readiness {
    conditions: Arc<RwLock<BTreeMap<&'static str, Condition>>>,
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Its name, such as `postgresql`.
    pub name: &'static str,
    /// Why it does not hold; `None` when it does.
    pub missing: Option<String>,
    /// What is worth knowing although it holds.
    pub note: Option<String>,
    /// Whether traffic is wanted all the same while it does not hold.
    pub optional: bool,
}

impl Readiness {
    /// Conditions of which none holds yet.
    pub fn new(names: &[&'static str]) -> Self {
        let conditions = names
            .iter()
            .map(|&name| (name, Condition::missing(name, "not checked yet")));
        Self {
            conditions: Arc::new(RwLock::new(conditions.collect())),
        }
    }

    /// From now on `name` holds.
    pub fn pass(&self, name: &'static str) {
        self.set(Condition::holds(name));
    }

    /// From now on `name` says this of itself, and traffic is wanted whatever it says: `Err` when
    /// it does not hold.
    pub fn inform(&self, name: &'static str, state: Result<Option<String>, String>) {
        let (missing, note) = match state {
            Ok(note) => (None, note),
            Err(reason) => (Some(reason), None),
        };
        self.set(Condition {
            name,
            missing,
            note,
            optional: true,
        });
    }

    /// From now on `name` does not hold, because of `reason`: shown to anyone, so nothing about
    /// the inside.
    pub fn fail(&self, name: &'static str, reason: impl Into<String>) {
        self.set(Condition::missing(name, reason));
    }

    /// All conditions, by name.
    pub fn conditions(&self) -> Vec<Condition> {
        self.conditions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    fn set(&self, condition: Condition) {
        self.conditions
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(condition.name, condition);
    }
}

impl Condition {
    fn holds(name: &'static str) -> Self {
        Self {
            name,
            missing: None,
            note: None,
            optional: false,
        }
    }

    fn missing(name: &'static str, reason: impl Into<String>) -> Self {
        Self {
            missing: Some(reason.into()),
            ..Self::holds(name)
        }
    }

    /// Whether it stands in the way of traffic.
    pub fn blocks(&self) -> bool {
        self.missing.is_some() && !self.optional
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_holds_until_somebody_says_so_and_clones_share_it() {
        let readiness = Readiness::new(&["redis", "postgresql"]);
        assert!(
            readiness
                .conditions()
                .iter()
                .all(|condition| condition.missing.is_some())
        );
        let clone = readiness.clone();
        clone.pass("redis");
        clone.fail("postgresql", "refused");
        let conditions = readiness.conditions();
        assert_eq!(conditions[0].missing.as_deref(), Some("refused"));
        assert_eq!(conditions[1].missing, None);
        assert!(conditions[0].blocks() && !conditions[1].blocks());
        clone.inform("postgresql", Err("slow".to_owned()));
        clone.inform("redis", Ok(Some("fine".to_owned())));
        let conditions = readiness.conditions();
        assert_eq!(conditions[0].missing.as_deref(), Some("slow"));
        assert_eq!(conditions[1].note.as_deref(), Some("fine"));
        assert!(!conditions.iter().any(Condition::blocks));
    }
}
