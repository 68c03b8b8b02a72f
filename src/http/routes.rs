//! How a resource names its routes: who may use them and what they refuse, beside the handler.

use std::{collections::BTreeMap, collections::HashMap, sync::Arc};

use axum::{http::Method, routing::MethodRouter};
use utoipa::openapi::{
    ContentBuilder, Ref, ResponseBuilder,
    path::{Operation, PathItem, Paths},
    security::SecurityRequirement,
};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};

use super::{
    HttpState, Listener,
    limit::Charge,
    problem::{Code, MEDIA_TYPE},
};

/// The name of the way to authenticate in the OpenAPI document.
pub(super) const SECURITY: &str = "access_token";

/// The name of the other way.
pub(super) const API_KEY: &str = "api_key";

/// Who may use a route. The handler's extractors enforce it; a test compares the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Everybody.
    Anyone,
    /// Whoever has a valid token, or an API key with the scope for it.
    Caller,
    /// Whoever has a valid token; nobody with an API key.
    Person,
    /// Who runs sales. On the operators' listener only, if there is one.
    Operator,
    /// Who manages users, with a token. On the operators' listener only, if there is one.
    Admin,
    /// Everybody who reaches the operators' listener, or the only one.
    Internal,
}

/// Which requests to a route the audit log has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Noted {
    /// None: what buyers and visitors do has its own records.
    No,
    /// Those of operators.
    OfOperators,
    /// Those that are refused.
    Refused,
    /// All.
    All,
}

/// One operation.
pub(super) struct Route {
    pub(super) access: Access,
    noted: Option<Noted>,
    refusals: &'static [Code],
    parts: UtoipaMethodRouter<HttpState>,
}

/// The routes of one resource.
#[derive(Default)]
pub(super) struct Routes(Vec<Route>);

impl Routes {
    /// None yet.
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// One more, made by `routes!(handler)`. `refusals` are the codes of its own; those that
    /// follow from its access and its body are added to the document anyway.
    #[must_use]
    pub(super) fn add(
        mut self,
        access: Access,
        parts: UtoipaMethodRouter<HttpState>,
        refusals: &'static [Code],
    ) -> Self {
        self.0.push(Route {
            access,
            noted: None,
            refusals,
            parts,
        });
        self
    }

    /// Has the audit log note these requests to the route that was added last, rather than those
    /// that follow from who it is for.
    #[must_use]
    pub(super) fn noting(mut self, noted: Noted) -> Self {
        if let Some(route) = self.0.last_mut() {
            route.noted = Some(noted);
        }
        self
    }
}

#[cfg(test)]
impl Routes {
    pub(super) fn into_iter(self) -> impl Iterator<Item = Route> {
        self.0.into_iter()
    }
}

#[cfg(test)]
impl Route {
    pub(super) fn paths(&mut self) -> impl Iterator<Item = (&String, &mut PathItem)> {
        self.parts.1.paths.iter_mut()
    }
}

/// Every template that was mounted.
pub(super) type Names = HashMap<String, Name>;

/// What a template is called elsewhere; the aliases share it.
#[derive(Clone)]
pub(super) struct Name {
    /// What metrics call it.
    pub(super) route: Arc<str>,
    /// What the audit log notes of it, and calls it.
    pub(super) noted: Arc<[(Method, Noted, Arc<str>)]>,
    /// What requests that read are charged.
    pub(super) reading: Option<Charge>,
    /// What other requests are charged.
    pub(super) changing: Option<Charge>,
}

impl Name {
    /// What a request with this method is charged.
    pub(super) fn charge(&self, method: &Method) -> Option<Charge> {
        if method.is_safe() {
            self.reading
        } else {
            self.changing
        }
    }
}

/// Mounts `resources`: what starts with `/v1/` also at `/api/`.
pub(super) fn mount(
    mut router: OpenApiRouter<HttpState>,
    resources: Vec<Routes>,
    listener: Listener,
) -> (OpenApiRouter<HttpState>, Names) {
    let mut names = Names::new();
    for route in resources.into_iter().flat_map(|routes| routes.0) {
        if listener == Listener::Public
            && matches!(
                route.access,
                Access::Operator | Access::Admin | Access::Internal
            )
        {
            continue;
        }
        let (schemas, mut paths, methods) = route.parts;
        describe(&mut paths, route.access, route.refusals);
        for (path, item) in &paths.paths {
            let known = names.get(path);
            let mut noted = known.map(|name| name.noted.to_vec()).unwrap_or_default();
            let mut reading = known.and_then(|name| name.reading);
            let mut changing = known.and_then(|name| name.changing);
            let charge = Charge::of(route.access, item.get.is_some(), path);
            if item.get.is_some() {
                reading = charge;
            } else if changing.is_none() || route.access != Access::Operator {
                // What everybody may do is charged as such, also where operators may do more.
                changing = charge;
            }
            noted.extend(actions(item).filter_map(|(method, operation)| {
                let which = route
                    .noted
                    .unwrap_or_else(|| usually_noted(route.access, &method, path));
                (which != Noted::No).then(|| (method, which, operation.as_str().into()))
            }));
            let name = Name {
                route: path.as_str().into(),
                noted: noted.into(),
                reading,
                changing,
            };
            if let Some(rest) = path.strip_prefix("/v1/") {
                let alias = format!("/api/{rest}");
                router = router.route(&alias, MethodRouter::clone(&methods));
                names.insert(alias, name.clone());
            }
            names.insert(path.clone(), name);
        }
        router = router.routes((schemas, paths, methods));
    }
    (router, names)
}

/// The operations of a path.
pub(super) fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [
        &mut item.get,
        &mut item.post,
        &mut item.put,
        &mut item.patch,
        &mut item.delete,
    ]
    .into_iter()
    .filter_map(Option::as_mut)
}

/// Which requests are noted where the resource does not say: what operators do, and what anybody
/// does to an account.
fn usually_noted(access: Access, method: &Method, path: &str) -> Noted {
    let account = path.starts_with("/v1/auth/") || path.starts_with("/v1/me");
    match access {
        Access::Operator | Access::Admin => Noted::All,
        Access::Anyone | Access::Caller | Access::Person if account && !method.is_safe() => {
            Noted::All
        }
        Access::Anyone | Access::Caller | Access::Person | Access::Internal => Noted::No,
    }
}

/// The operations of a path by their methods, with their names.
pub(super) fn actions(item: &PathItem) -> impl Iterator<Item = (Method, &String)> {
    [
        (Method::GET, &item.get),
        (Method::POST, &item.post),
        (Method::PUT, &item.put),
        (Method::PATCH, &item.patch),
        (Method::DELETE, &item.delete),
    ]
    .into_iter()
    .filter_map(|(method, operation)| Some((method, operation.as_ref()?.operation_id.as_ref()?)))
}

/// Writes into the document who may use an operation, and every problem that it can answer.
fn describe(paths: &mut Paths, access: Access, own: &[Code]) {
    let operations = paths.paths.iter_mut().flat_map(|(path, item)| {
        let limited = Charge::of(access, true, path).is_some();
        operations(item).map(move |operation| (operation, limited))
    });
    for (operation, limited) in operations {
        // Handlers have short names; in the document they stand beside those of other resources.
        if let (Some(tags), Some(name)) = (&operation.tags, &operation.operation_id) {
            operation.operation_id = Some(format!("{}_{name}", tags.join("_")));
        }
        let mut codes = own.to_vec();
        codes.push(Code::Internal);
        codes.push(Code::Unavailable);
        if limited {
            codes.push(Code::RateLimited);
        }
        if operation.request_body.is_some() {
            codes.extend([
                Code::Validation,
                Code::PayloadTooLarge,
                Code::RequestTimeout,
                Code::UnsupportedMediaType,
            ]);
        }
        match access {
            Access::Anyone | Access::Internal => {}
            Access::Caller | Access::Person | Access::Operator | Access::Admin => {
                codes.extend([Code::Unauthenticated, Code::Forbidden]);
            }
        }
        let ways: &[&str] = match access {
            Access::Anyone | Access::Internal => &[],
            Access::Person | Access::Admin => &[SECURITY],
            Access::Caller | Access::Operator => &[SECURITY, API_KEY],
        };
        if !ways.is_empty() {
            let ways = ways
                .iter()
                .map(|way| SecurityRequirement::new(*way, [""; 0]));
            operation.security = Some(ways.collect());
        }
        let mut by_status: BTreeMap<u16, Vec<&str>> = BTreeMap::new();
        for code in codes {
            let meaning = code.meaning();
            by_status
                .entry(meaning.status.as_u16())
                .or_default()
                .push(meaning.word);
            if code == Code::Validation && operation.request_body.is_some() {
                by_status.entry(422).or_default().push(meaning.word);
            }
        }
        for (status, mut words) in by_status {
            words.sort_unstable();
            words.dedup();
            let content = ContentBuilder::new()
                .schema(Some(Ref::from_schema_name("Problem")))
                .build();
            let response = ResponseBuilder::new()
                .description(words.join(", "))
                .content(MEDIA_TYPE, content)
                .build();
            operation
                .responses
                .responses
                .insert(status.to_string(), response.into());
        }
    }
}
