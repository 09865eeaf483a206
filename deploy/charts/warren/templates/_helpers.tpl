{{- define "warren.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* Labels of every object. A component's own name is app.kubernetes.io/name, which is what selectors take. */}}
{{- define "warren.labels" -}}
app.kubernetes.io/part-of: warren
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}

{{/* What daemon and controller are both told. */}}
{{- define "warren.meshArgs" -}}
- --trust-domain={{ .Values.mesh.trustDomain }}
{{- with .Values.mesh.trustDomainAliases }}
- --trust-domain-alias={{ join "," . }}
{{- end }}
- --root-namespace={{ .Values.mesh.rootNamespace }}
- --cluster-name={{ .Values.mesh.clusterName }}
- --cluster-domain={{ .Values.mesh.clusterDomain }}
- --log-level={{ .Values.log.level }}
- --log-format={{ .Values.log.format }}
{{- end -}}

{{- define "warren.caAddress" -}}
{{- .Values.ca.address | default (printf "https://warren-controller.%s.svc:15012" .Release.Namespace) -}}
{{- end -}}
