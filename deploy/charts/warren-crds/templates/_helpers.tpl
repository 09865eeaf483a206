{{/* Whether a definition is ours to make: nobody made it, or this release did. Call with (list . NAME). */}}
{{- define "warren-crds.ours" -}}
{{- $root := index . 0 -}}
{{- $found := lookup "apiextensions.k8s.io/v1" "CustomResourceDefinition" "" (index . 1) -}}
{{- if or (not $found) (eq (dig "metadata" "annotations" "meta.helm.sh/release-name" "" $found) $root.Release.Name) -}}
yes
{{- end -}}
{{- end -}}

{{- define "warren-crds.selector" -}}
description: The workloads that the policy is for, by their labels; without it, all of the namespace.
type: object
properties:
  matchLabels:
    type: object
    maxProperties: 4096
    additionalProperties:
      type: string
      maxLength: 63
      x-kubernetes-validations:
        - rule: "!self.contains('*')"
          message: a label is compared as it is, so there is no wildcard
    x-kubernetes-validations:
      - rule: self.all(key, size(key) > 0)
        message: a label has a name
{{- end -}}

{{- define "warren-crds.targetRef" -}}
type: object
required: [kind, name]
properties:
  group:
    type: string
    maxLength: 253
  kind:
    type: string
    minLength: 1
    maxLength: 63
  name:
    type: string
    minLength: 1
    maxLength: 253
  namespace:
    description: The policy's own namespace, or nothing.
    type: string
    maxLength: 63
{{- end -}}

{{/* Call with the description. */}}
{{- define "warren-crds.texts" -}}
description: {{ . }}
type: array
items:
  type: string
{{- end -}}

{{- define "warren-crds.status" -}}
description: What others report about it.
type: object
x-kubernetes-preserve-unknown-fields: true
{{- end -}}

{{- define "warren-crds.authorizationPolicy" -}}
type: object
properties:
  spec:
    description: Who may connect. An OR of rules; no rule at all never matches.
    type: object
    x-kubernetes-validations:
      - rule: "(has(self.selector) ? 1 : 0) + (has(self.targetRef) ? 1 : 0) + (has(self.targetRefs) && size(self.targetRefs) > 0 ? 1 : 0) <= 1"
        message: only one of selector, targetRef and targetRefs can be set
    properties:
      selector:
        {{- include "warren-crds.selector" . | nindent 8 }}
      targetRef:
        description: As targetRefs with one entry.
        {{- include "warren-crds.targetRef" . | nindent 8 }}
      targetRefs:
        description: The Gateways, Services or ServiceEntries that the policy is for, enforced by their waypoints.
        type: array
        maxItems: 16
        items:
          {{- include "warren-crds.targetRef" . | nindent 10 }}
      action:
        description: What happens to a connection that a rule matches; ALLOW if nothing is said.
        type: string
        enum: [ALLOW, DENY, AUDIT, CUSTOM]
      provider:
        description: Who decides where the action is CUSTOM.
        type: object
        properties:
          name:
            type: string
      rules:
        type: array
        maxItems: 512
        items:
          description: An AND of from, to and when; each of them an OR of its entries. An empty rule matches everything.
          type: object
          properties:
            from:
              type: array
              maxItems: 512
              items:
                type: object
                properties:
                  source:
                    description: Who connects. An AND of its fields.
                    type: object
                    properties:
                      principals:
                        {{- include "warren-crds.texts" "Identities without spiffe://, as cluster.local/ns/shop/sa/web." | nindent 24 }}
                      notPrincipals:
                        {{- include "warren-crds.texts" "None of these identities." | nindent 24 }}
                      serviceAccounts:
                        {{- include "warren-crds.texts" "Service accounts, as namespace/name, or name for the policy's namespace." | nindent 24 }}
                        maxItems: 16
                      notServiceAccounts:
                        {{- include "warren-crds.texts" "None of these service accounts." | nindent 24 }}
                        maxItems: 16
                      requestPrincipals:
                        {{- include "warren-crds.texts" "Identities from a request's token; of HTTP alone." | nindent 24 }}
                      notRequestPrincipals:
                        {{- include "warren-crds.texts" "None of these identities from a request's token." | nindent 24 }}
                      namespaces:
                        {{- include "warren-crds.texts" "Namespaces of the identities." | nindent 24 }}
                      notNamespaces:
                        {{- include "warren-crds.texts" "None of these namespaces." | nindent 24 }}
                      ipBlocks:
                        {{- include "warren-crds.texts" "Addresses and ranges from which the connection comes." | nindent 24 }}
                      notIpBlocks:
                        {{- include "warren-crds.texts" "None of these addresses." | nindent 24 }}
                      remoteIpBlocks:
                        {{- include "warren-crds.texts" "Addresses of the client behind proxies; of HTTP alone." | nindent 24 }}
                      notRemoteIpBlocks:
                        {{- include "warren-crds.texts" "None of these addresses behind proxies." | nindent 24 }}
            to:
              type: array
              maxItems: 512
              items:
                type: object
                properties:
                  operation:
                    description: What is asked for. An AND of its fields.
                    type: object
                    properties:
                      ports:
                        {{- include "warren-crds.texts" "Ports of the workload, not of its service." | nindent 24 }}
                      notPorts:
                        {{- include "warren-crds.texts" "None of these ports." | nindent 24 }}
                      hosts:
                        {{- include "warren-crds.texts" "Hosts of a request; of HTTP alone." | nindent 24 }}
                      notHosts:
                        {{- include "warren-crds.texts" "None of these hosts." | nindent 24 }}
                      methods:
                        {{- include "warren-crds.texts" "Methods of a request; of HTTP alone." | nindent 24 }}
                      notMethods:
                        {{- include "warren-crds.texts" "None of these methods." | nindent 24 }}
                      paths:
                        {{- include "warren-crds.texts" "Paths of a request; of HTTP alone." | nindent 24 }}
                      notPaths:
                        {{- include "warren-crds.texts" "None of these paths." | nindent 24 }}
            when:
              type: array
              maxItems: 512
              items:
                description: One more condition, by the name of what it is about.
                type: object
                required: [key]
                properties:
                  key:
                    description: Such as source.ip, source.namespace, source.principal, destination.ip, destination.port.
                    type: string
                    minLength: 1
                  values:
                    {{- include "warren-crds.texts" "Any of these values." | nindent 20 }}
                  notValues:
                    {{- include "warren-crds.texts" "None of these values." | nindent 20 }}
  status:
    {{- include "warren-crds.status" . | nindent 4 }}
{{- end -}}

{{- define "warren-crds.mutualTls" -}}
type: object
properties:
  mode:
    description: STRICT refuses plaintext; PERMISSIVE, the default, takes both; DISABLE counts as PERMISSIVE; UNSET inherits.
    type: string
    enum: [UNSET, DISABLE, PERMISSIVE, STRICT]
{{- end -}}

{{- define "warren-crds.peerAuthentication" -}}
type: object
properties:
  spec:
    description: What workloads accept from their peers.
    type: object
    x-kubernetes-validations:
      - rule: "!has(self.portLevelMtls) || (has(self.selector) && has(self.selector.matchLabels) && size(self.selector.matchLabels) > 0)"
        message: portLevelMtls counts only with a selector
    properties:
      selector:
        {{- include "warren-crds.selector" . | nindent 8 }}
      mtls:
        {{- include "warren-crds.mutualTls" . | nindent 8 }}
      portLevelMtls:
        description: A mode of its own for a port of the workload, by its number.
        type: object
        minProperties: 1
        maxProperties: 65535
        x-kubernetes-validations:
          - rule: self.all(port, port.matches('^[0-9]{1,5}$') && 0 < int(port) && int(port) <= 65535)
            message: a port is a number from 1 to 65535
        additionalProperties:
          {{- include "warren-crds.mutualTls" . | nindent 10 }}
  status:
    {{- include "warren-crds.status" . | nindent 4 }}
{{- end -}}
