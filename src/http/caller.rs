//! Who asks: the access token or API key, understood, and the roles that routes require.

use std::sync::Arc;

use axum::{
    extract::{FromRef, FromRequestParts},
    http::{header::AUTHORIZATION, request},
};

use super::{
    limit,
    problem::{Code, Problem},
};
use crate::{
    auth::{
        Role,
        api_key::Scope,
        bearer::{Bearer, BearerError, Bearers},
        token::Identity,
    },
    store::audit_log::{Actor, Origin},
};

/// Whoever has a valid token, or an API key with the scope for it. Every role may buy, for itself
/// only.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller(pub(super) Identity);

/// A caller with a token. Machines do not manage the account that they act for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Person(pub(super) Identity);

/// A caller who runs sales.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operator(pub(super) Identity);

/// A person who manages users.
#[derive(Clone, Copy, Debug)]
pub(super) struct Admin(pub(super) Identity);

impl<S> FromRequestParts<S> for Caller
where
    S: Sync,
    Arc<Bearers>: FromRef<S>,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut request::Parts, state: &S) -> Result<Self, Problem> {
        let machine = match identify(parts, state).await? {
            Bearer::Person(identity) => return Ok(Self(identity)),
            Bearer::Machine(machine) => machine,
        };
        let scope = if parts.method.is_safe() {
            Scope::Read
        } else {
            Scope::Buy
        };
        if !machine.may(scope) {
            let detail = format!("This takes an API key with the scope `{}`.", scope.as_str());
            return Err(Problem::new(Code::Forbidden, detail));
        }
        Ok(Self(machine.identity()))
    }
}

impl<S> FromRequestParts<S> for Person
where
    S: Sync,
    Arc<Bearers>: FromRef<S>,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut request::Parts, state: &S) -> Result<Self, Problem> {
        match identify(parts, state).await? {
            Bearer::Person(identity) => Ok(Self(identity)),
            Bearer::Machine(_) => {
                let detail = "This takes an access token: an API key may not do it.";
                Err(Problem::new(Code::Forbidden, detail))
            }
        }
    }
}

impl<S> FromRequestParts<S> for Operator
where
    S: Sync,
    Arc<Bearers>: FromRef<S>,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut request::Parts, state: &S) -> Result<Self, Problem> {
        let identity = match identify(parts, state).await? {
            Bearer::Person(identity) => identity,
            Bearer::Machine(machine) => machine.identity(),
        };
        if identity.role.operates() {
            Ok(Self(identity))
        } else {
            Err(Problem::new(Code::Forbidden, "Only operators may do this."))
        }
    }
}

impl<S> FromRequestParts<S> for Admin
where
    S: Sync,
    Arc<Bearers>: FromRef<S>,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut request::Parts, state: &S) -> Result<Self, Problem> {
        let Person(identity) = Person::from_request_parts(parts, state).await?;
        if identity.role == Role::Admin {
            Ok(Self(identity))
        } else {
            Err(Problem::new(Code::Forbidden, "Only admins may do this."))
        }
    }
}

/// What the audit log calls a caller.
pub(super) fn actor(identity: &Identity) -> Actor {
    Actor {
        user: Some(identity.user),
        role: identity.role.as_str(),
        credential: identity.session,
    }
}

/// Who asks, and who acts in whatever follows.
async fn identify<S>(parts: &request::Parts, state: &S) -> Result<Bearer, Problem>
where
    Arc<Bearers>: FromRef<S>,
{
    let known = match bearer(parts) {
        Some(text) => Arc::<Bearers>::from_ref(state).identify(text).await,
        None => Err(BearerError::Invalid),
    };
    let known = known.map_err(|error| match error {
        // One answer to everything that is wrong: it does not help whoever tries.
        BearerError::Invalid => {
            Problem::new(Code::Unauthenticated, "A valid access token is required.")
        }
        BearerError::Busy => Problem::unavailable("Too many API keys are being looked up."),
        BearerError::Provider => Problem::unavailable("The identity provider does not answer."),
        BearerError::Store(error) => Problem::from(error).of_reading(),
    })?;
    Origin::acts(|| match &known {
        Bearer::Person(identity) => actor(identity),
        Bearer::Machine(machine) => Actor {
            credential: Some(machine.key()),
            ..actor(&machine.identity())
        },
    });
    // A machine is counted as the user whose key it has.
    let user = match &known {
        Bearer::Person(identity) => identity.user,
        Bearer::Machine(machine) => machine.identity().user,
    };
    limit::user(&parts.extensions, user)?;
    Ok(known)
}

fn bearer(parts: &request::Parts) -> Option<&str> {
    let mut values = parts.headers.get_all(AUTHORIZATION).iter();
    let (scheme, token) = values.next()?.to_str().ok()?.split_once(' ')?;
    let single = values.next().is_none();
    (single && scheme.eq_ignore_ascii_case("bearer")).then(|| token.trim_matches(' '))
}

#[cfg(test)]
mod tests {
    use axum::{
        Router,
        body::Body,
        http::{Request, StatusCode, header::WWW_AUTHENTICATE},
        routing::get,
    };
    use serde_json::Value;
    use uuid::Uuid;

    use super::{
        super::tests::{Answer, edged},
        *,
    };
    use crate::{
        auth::{
            bearer::tests::bearers,
            token::tests::{forged, keys},
        },
        clock,
    };

    fn app() -> Router {
        let router = Router::new()
            .route(
                "/me",
                get(async |Caller(identity): Caller| identity.user.to_string()),
            )
            .route("/run", get(async |_: Operator| ()));
        edged(router.with_state(bearers()))
    }

    async fn send(uri: &str, authorization: &[&str]) -> Answer {
        let mut request = Request::get(uri);
        for value in authorization {
            request = request.header(AUTHORIZATION, *value);
        }
        Answer::of(app(), request.body(Body::empty()).unwrap()).await
    }

    fn token(role: Role) -> String {
        let identity = Identity {
            user: Uuid::from_u128(9),
            role,
            session: None,
            registered_at: None,
        };
        keys()
            .mint(identity, clock::new_id(), clock::now())
            .unwrap()
    }

    #[tokio::test]
    async fn every_bad_token_gets_the_same_answer() {
        let good = token(Role::Buyer);
        let mut headers: Vec<_> = forged()
            .into_iter()
            .map(|(_, token)| vec![format!("Bearer {token}")])
            .collect();
        headers.extend([
            vec![],
            vec![good.clone()],
            vec![format!("Basic {good}")],
            vec![format!("Bearer{good}")],
            vec![format!("Bearer {good} {good}")],
            vec![format!("Bearer {good}"), format!("Bearer {good}")],
        ]);
        let mut bodies: Vec<Value> = Vec::new();
        for values in headers {
            let values: Vec<_> = values.iter().map(String::as_str).collect();
            let mut answer = send("/me", &values).await;
            answer.is_problem(StatusCode::UNAUTHORIZED, Code::Unauthenticated);
            assert_eq!(answer.headers[WWW_AUTHENTICATE], "Bearer");
            answer.body.as_object_mut().unwrap().remove("instance");
            bodies.push(answer.body);
        }
        assert!(bodies.len() > 40 && bodies.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[tokio::test]
    async fn roles_are_required_where_they_are() {
        for (role, status) in [
            (Role::Buyer, StatusCode::FORBIDDEN),
            (Role::Operator, StatusCode::OK),
            (Role::Admin, StatusCode::OK),
        ] {
            let header = format!("bearer {}", token(role));
            assert_eq!(
                send("/me", &[&header]).await.text,
                Uuid::from_u128(9).to_string()
            );
            assert_eq!(send("/run", &[&header]).await.status, status);
        }
        assert_eq!(send("/run", &[]).await.status, StatusCode::UNAUTHORIZED);
    }
}
