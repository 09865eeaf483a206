//! What the manifests grant, asked back: may each account do what its roles say, and may the person install them.

use crate::cli::{
    api::{ApiError, Cluster, Resource},
    check::facts::Right,
    manifests::{self, NAMESPACE, Object},
};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use std::collections::BTreeSet;

const SUBJECT_REVIEWS: Resource = Resource::new("authorization.k8s.io/v1", "subjectaccessreviews");
const OWN_REVIEWS: Resource = Resource::new("authorization.k8s.io/v1", "selfsubjectaccessreviews");
const AT_ONCE: usize = 8;

/// One question to the API server's authorizer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Question {
    /// A service account of Warren's; `None` for the person.
    account: Option<String>,
    verb: String,
    group: String,
    resource: String,
    name: Option<String>,
    namespace: Option<String>,
}

/// The rights that are needed and not there: before the installation the person's, after it the accounts'.
pub(super) async fn missing(cluster: &Cluster, before_install: bool) -> Result<Vec<Right>, ApiError> {
    // Without manifests there is nothing to ask: `warren install` says what is wrong with them.
    let objects = manifests::all().unwrap_or_default();
    let questions = if before_install {
        of_installer(&objects)
    } else {
        of_accounts(&objects)
    };
    let asked = stream::iter(questions).map(|question| async move {
        let allowed = ask(cluster, &question).await?;
        Ok::<_, ApiError>((question, allowed))
    });
    let answers: Vec<(Question, bool)> = asked.buffered(AT_ONCE).try_collect().await?;
    let denied = answers.into_iter().filter(|(_, allowed)| !allowed);
    Ok(denied.map(|(question, _)| question.into_right()).collect())
}

impl Question {
    fn into_right(self) -> Right {
        let mut resource = self.resource;
        if !self.group.is_empty() {
            resource.push_str(&format!(".{}", self.group));
        }
        if let Some(name) = self.name {
            resource.push_str(&format!("/{name}"));
        }
        Right {
            account: self.account,
            verb: self.verb,
            resource,
            namespace: self.namespace,
        }
    }
}

async fn ask(cluster: &Cluster, question: &Question) -> Result<bool, ApiError> {
    let mut spec = json!({
        "resourceAttributes": {
            "verb": question.verb,
            "group": question.group,
            "resource": question.resource,
            "name": question.name,
            "namespace": question.namespace,
        }
    });
    let (resource, kind) = match &question.account {
        Some(account) => {
            spec["user"] = json!(format!("system:serviceaccount:{NAMESPACE}:{account}"));
            spec["groups"] = json!([
                "system:serviceaccounts",
                format!("system:serviceaccounts:{NAMESPACE}"),
                "system:authenticated"
            ]);
            (SUBJECT_REVIEWS, "SubjectAccessReview")
        }
        None => (OWN_REVIEWS, "SelfSubjectAccessReview"),
    };
    let review = json!({"apiVersion": resource.api, "kind": kind, "spec": spec});
    let answer = cluster.create(resource, None, &review).await?;
    Ok(answer["status"]["allowed"] == true)
}

/// Every verb of every rule, for the account that the role of that name is bound to.
fn of_accounts(objects: &[Object]) -> BTreeSet<Question> {
    let mut questions = BTreeSet::new();
    for role in objects
        .iter()
        .filter(|object| matches!(object.kind(), "Role" | "ClusterRole"))
    {
        for rule in role.value["rules"].as_array().into_iter().flatten() {
            let names: Vec<Option<String>> = match texts(rule, "resourceNames").as_slice() {
                [] => vec![None],
                names => names.iter().cloned().map(Some).collect(),
            };
            for group in texts(rule, "apiGroups") {
                for resource in texts(rule, "resources") {
                    for verb in texts(rule, "verbs") {
                        questions.extend(names.iter().map(|name| Question {
                            account: Some(role.name().to_owned()),
                            verb: verb.clone(),
                            group: group.clone(),
                            resource: resource.clone(),
                            name: name.clone(),
                            namespace: role.namespace().map(str::to_owned),
                        }));
                    }
                }
            }
        }
    }
    questions
}

/// Server-side apply of each kind that is installed.
fn of_installer(objects: &[Object]) -> BTreeSet<Question> {
    let each = objects.iter().flat_map(|object| {
        ["create", "patch"].map(|verb| Question {
            account: None,
            verb: verb.to_owned(),
            group: object.resource.group().to_owned(),
            resource: object.resource.plural.to_owned(),
            name: None,
            namespace: object.namespace().map(str::to_owned),
        })
    });
    each.collect()
}

fn texts(rule: &Value, key: &str) -> Vec<String> {
    let list = rule[key].as_array().into_iter().flatten();
    list.filter_map(Value::as_str).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_of_the_roles_is_asked_for_its_own_account() {
        let questions = of_accounts(&manifests::all().unwrap());
        let is_there = |account: &str, verb: &str, resource: &str, name: Option<&str>| {
            questions.iter().any(|q| {
                q.account.as_deref() == Some(account)
                    && q.verb == verb
                    && q.resource == resource
                    && q.name.as_deref() == name
            })
        };
        assert!(is_there("warren-node", "watch", "endpointslices", None));
        assert!(is_there("warren-node", "get", "daemonsets", Some("warren-node")));
        assert!(is_there("warren-controller", "create", "tokenreviews", None));
        assert!(is_there("warren-controller", "get", "secrets", Some("warren-ca")));
        assert!(!is_there("warren-node", "create", "tokenreviews", None));
    }

    #[test]
    fn a_right_is_named_as_kubectl_names_it() {
        let question = Question {
            account: Some("warren-node".into()),
            verb: "get".into(),
            group: "apps".into(),
            resource: "daemonsets".into(),
            name: Some("warren-node".into()),
            namespace: Some("warren-system".into()),
        };
        assert_eq!(question.into_right().resource, "daemonsets.apps/warren-node");
    }

    #[test]
    fn who_installs_needs_to_make_every_kind() {
        let questions = of_installer(&manifests::all().unwrap());
        for plural in ["customresourcedefinitions", "clusterroles", "daemonsets", "namespaces"] {
            assert!(
                questions.iter().any(|q| q.resource == plural && q.verb == "create"),
                "{plural}"
            );
        }
    }
}
